// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// The only header that asks which compiler reads it.
#pragma once

#if defined(__CUDACC__)
#define DCN_HOST_DEVICE __host__ __device__
#define DCN_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define DCN_HOST_DEVICE
#define DCN_INLINE inline __attribute__((always_inline))
#else
#define DCN_HOST_DEVICE
#define DCN_INLINE inline
#endif

// DCN_VECTOR_CLONES compiles a function once per instruction set and picks the
// best one when the library is loaded, so that one binary serves every x86-64
// processor. The bodies are plain loops in DCN_INLINE functions. Sanitizers
// cannot instrument the resolver, which runs before they are set up.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && \
    !defined(__clang__) && !defined(__CUDACC__) &&                    \
    !defined(__SANITIZE_ADDRESS__)
#if __GNUC__ >= 12
#define DCN_VECTOR_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DCN_VECTOR_CLONES \
  __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define DCN_VECTOR_CLONES
#endif

// Whether the processor that runs this multiplies bfloat16 by itself.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__CUDACC__)
#define DCN_HAS_BFLOAT16_UNITS() (__builtin_cpu_supports("avx512bf16") != 0)
#else
#define DCN_HAS_BFLOAT16_UNITS() false
#endif

// Whether the GPU that is compiled for adds four floats at once: from this
// architecture and toolkit on.
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 900 && CUDART_VERSION >= 12010
#define DCN_VECTOR_ATOMICS true
#else
#define DCN_VECTOR_ATOMICS false
#endif
