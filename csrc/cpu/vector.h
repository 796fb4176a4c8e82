// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Vectors of a fixed number of elements (GCC's and Clang's vector extension),
// where loops are too short to be vectorized well. Only for DCN_INLINE
// functions: an instruction set is chosen where they are inlined.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/round.h"
#include "math/macros.h"

namespace dcn::cpu {

template <typename T, int64_t kCount>
struct VectorOf {
  typedef T Type __attribute__((vector_size(kCount * sizeof(T))));
};

// Converts the elements from S.
template <typename T, int64_t kCount, typename S>
DCN_INLINE typename VectorOf<T, kCount>::Type load_vector(const S* from) {
  typename VectorOf<T, kCount>::Type vector;
  if constexpr (std::is_same_v<S, T>) {
    std::memcpy(&vector, from, sizeof(vector));
  } else {
    for (int64_t i = 0; i < kCount; ++i) {
      vector[i] = static_cast<T>(from[i]);
    }
  }
  return vector;
}

// Converts the elements to S.
template <typename T, int64_t kCount, typename S>
DCN_INLINE void store_vector(
    const typename VectorOf<T, kCount>::Type& vector,
    S* to) {
  if constexpr (std::is_same_v<S, T>) {
    std::memcpy(to, &vector, sizeof(vector));
  } else {
    for (int64_t i = 0; i < kCount; ++i) {
      to[i] = round_to<S>(static_cast<T>(vector[i]));
    }
  }
}

// The first `count` elements; the others are zero.
template <typename T, int64_t kCount, typename S>
DCN_INLINE typename VectorOf<T, kCount>::Type load_vector(
    const S* from,
    int64_t count) {
  typename VectorOf<T, kCount>::Type vector = {};
  for (int64_t i = 0; i < count; ++i) {
    vector[i] = static_cast<T>(from[i]);
  }
  return vector;
}

template <typename T, int64_t kCount, typename S>
DCN_INLINE void store_vector(
    const typename VectorOf<T, kCount>::Type& vector,
    S* to,
    int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = round_to<S>(static_cast<T>(vector[i]));
  }
}

// The sum of the elements, always in the same order.
template <typename T, int64_t kCount>
DCN_INLINE T sum_of(const typename VectorOf<T, kCount>::Type& vector) {
  if constexpr (kCount == 4) {
    return (vector[0] + vector[2]) + (vector[1] + vector[3]);
  } else {
    typename VectorOf<T, kCount / 2>::Type halves[2];
    std::memcpy(halves, &vector, sizeof(vector));
    return sum_of<T, kCount / 2>(halves[0] + halves[1]);
  }
}

} // namespace dcn::cpu
