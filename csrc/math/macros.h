// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Compiler-specific macros. No other header tests for the compiler or for CUDA.
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

// After the parameters of a lambda in a DCN_VECTOR_CLONES function. A lambda
// that is not inlined is compiled for the oldest processor.
#if defined(__GNUC__) && !defined(__CUDACC__)
#define DCN_INLINE_LAMBDA __attribute__((always_inline))
#else
#define DCN_INLINE_LAMBDA
#endif

#if defined(__GNUC__)
#define DCN_PREFETCH(address) __builtin_prefetch(address)
#else
#define DCN_PREFETCH(address) static_cast<void>(address)
#endif

// Instructions of x86-64, chosen at run time. -DDCN_PORTABLE leaves them out,
// for tests of what other processors run.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__CUDACC__) && \
    !defined(DCN_PORTABLE)
#define DCN_X86 1
#else
#define DCN_X86 0
#endif

// DCN_VECTOR_CLONES compiles a function once per instruction set; the loader
// picks the best one, so that one binary serves every x86-64 processor. The
// bodies are plain loops in DCN_INLINE functions. Off under sanitizers, which
// cannot instrument the resolver: it runs before they are initialised.
#if DCN_X86 && defined(__linux__) && !defined(__clang__) && \
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

// Whether the processor has instructions for bfloat16 GEMMs.
#if DCN_X86
#define DCN_HAS_BFLOAT16_UNITS() (__builtin_cpu_supports("avx512bf16") != 0)
#else
#define DCN_HAS_BFLOAT16_UNITS() false
#endif

// Whether the target GPU has atomicAdd(float4*). The emulator defines it
// itself.
#ifndef DCN_VECTOR_ATOMICS
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 900 && CUDART_VERSION >= 12010
#define DCN_VECTOR_ATOMICS true
#else
#define DCN_VECTOR_ATOMICS false
#endif
#endif
