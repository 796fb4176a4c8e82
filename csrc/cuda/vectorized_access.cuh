// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Loads, stores and atomic additions of several elements at once.

#pragma once

#include <cstring>
#include <type_traits>

#include <cuda_runtime.h>

#include "math/macros.h"

namespace dcn::cuda {

// kSize elements that are loaded and stored at once.
template <typename S, int kSize>
struct alignas(sizeof(S) * kSize) Vector {
  static_assert(sizeof(S) * kSize <= 16, "wider than a memory access");
  S value[kSize];
};

// Elements of the widest memory access, 16 bytes.
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
  if constexpr (sizeof(vector) == sizeof(int4)) {
    // Through an int4: the compiler splits stores of equal elements.
    int4 word;
    std::memcpy(&word, &vector, sizeof(word));
    *reinterpret_cast<int4*>(to) = word;
  } else {
    *reinterpret_cast<Vector<S, kSize>*>(to) = vector;
  }
}

// Loads kSize contiguous elements, converted to T.
template <int kSize, typename S, typename T>
__device__ __forceinline__ void load_values(const S* from, T (&to)[kSize]) {
  const auto vector = load_vector<kSize>(from);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    to[i] = static_cast<T>(vector.value[i]);
  }
}

template <int kSize, typename S, typename T>
__device__ __forceinline__ void store_values(S* to, const T (&from)[kSize]) {
  Vector<S, kSize> vector;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    vector.value[i] = static_cast<S>(from[i]);
  }
  store_vector(to, vector);
}

// Atomically adds to kSize contiguous elements. `to` is aligned to their total
// size, at most 16 bytes.
template <int kSize, typename T>
__device__ __forceinline__ void atomic_add(T* to, const T (&value)[kSize]) {
  constexpr bool kFloat4 =
      DCN_VECTOR_ATOMICS && std::is_same_v<T, float> && kSize % 4 == 0;
  if constexpr (kFloat4) {
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

} // namespace dcn::cuda
