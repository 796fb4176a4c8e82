// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include <type_traits>

#include <cuda_runtime.h>

#include "math/macros.h"

namespace dcn {

// kSize elements that are loaded and stored at once.
template <typename S, int kSize>
struct alignas(sizeof(S) * kSize) Vector {
  S value[kSize];
};

// The widest accesses of a GPU.
template <typename S>
constexpr int kVectorSize = 16 / sizeof(S);

template <int kSize, typename S>
__device__ __forceinline__ Vector<S, kSize> load_vector(const S* from) {
  return *reinterpret_cast<const Vector<S, kSize>*>(from);
}

template <int kSize, typename S>
__device__ __forceinline__ void store_vector(
    S* to,
    const Vector<S, kSize>& vector) {
  *reinterpret_cast<Vector<S, kSize>*>(to) = vector;
}

// Adds kSize neighbours to memory that others add to at the same time; `to` is
// aligned to them, up to 16 bytes.
template <int kSize, typename T>
__device__ __forceinline__ void atomic_add(T* to, const T (&value)[kSize]) {
#if __CUDA_ARCH__ >= 900 // the first with atomics on vectors
  constexpr bool kFours = std::is_same_v<T, float> && kSize % 4 == 0;
#else
  constexpr bool kFours = false;
#endif
  if constexpr (kFours) {
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      atomicAdd(
          reinterpret_cast<float4*>(to + i),
          make_float4(value[i], value[i + 1], value[i + 2], value[i + 3]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      atomicAdd(to + i, value[i]);
    }
  }
}

} // namespace dcn
