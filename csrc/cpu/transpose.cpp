// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "cpu/transpose.h"

#include <algorithm>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "cpu/vector.h"

namespace dcn::cpu {
namespace {

// Rows and columns of a block.
constexpr int64_t kBlock = 8;

template <typename T>
using Row = typename VectorOf<T, kBlock>::Type;

// With `a` and `b` in the same place of blocks of kSize x kSize above each
// other: the row above or below after the upper right and the lower left block
// were exchanged.
template <int64_t kSize, bool kAbove, typename T>
DCN_INLINE Row<T> exchanged(const Row<T>& a, const Row<T>& b) {
  const auto element = [&](int64_t i) {
    const int64_t from = kAbove ? i & ~kSize : i | kSize;
    return (i & kSize) == 0 ? a[from] : b[from];
  };
  return Row<T>{
      element(0),
      element(1),
      element(2),
      element(3),
      element(4),
      element(5),
      element(6),
      element(7)};
}

template <int64_t kSize, typename T>
DCN_INLINE void exchange_blocks(Row<T> (&rows)[kBlock]) {
#pragma GCC unroll 8
  for (int64_t i = 0; i < kBlock; ++i) {
    if ((i & kSize) == 0) {
      const Row<T> a = rows[i], b = rows[i + kSize];
      rows[i] = exchanged<kSize, true, T>(a, b);
      rows[i + kSize] = exchanged<kSize, false, T>(a, b);
    }
  }
}

template <typename From, typename To, bool kAdd, typename T>
DCN_INLINE void transpose_block(
    const From* from,
    int64_t from_stride,
    const T* bias,
    To* to,
    int64_t to_stride) {
  Row<T> rows[kBlock];
#pragma GCC unroll 8
  for (int64_t i = 0; i < kBlock; ++i) {
    rows[i] = load_vector<T, kBlock>(from + i * from_stride);
  }
  exchange_blocks<4, T>(rows);
  exchange_blocks<2, T>(rows);
  exchange_blocks<1, T>(rows);
#pragma GCC unroll 8
  for (int64_t i = 0; i < kBlock; ++i) {
    Row<T> row = rows[i];
    if (bias != nullptr) {
      row += bias[i];
    }
    if constexpr (kAdd) {
      row += load_vector<T, kBlock>(to + i * to_stride);
    }
    store_vector<T, kBlock>(row, to + i * to_stride);
  }
}

template <typename From, typename To, bool kAdd, typename T>
DCN_INLINE void transpose_element(const From* from, const T* bias, To* to) {
  T value = static_cast<T>(*from);
  if (bias != nullptr) {
    value += *bias;
  }
  if constexpr (kAdd) {
    value += static_cast<T>(*to);
  }
  *to = round_to<To>(value);
}

template <typename From, typename To, bool kAdd, typename T>
DCN_INLINE void transpose_body(
    const From* from,
    int64_t from_stride,
    int64_t rows,
    int64_t columns,
    const T* bias,
    To* to,
    int64_t to_stride) {
  // Block after block along the side whose rows are farther apart, so that few
  // of its cache lines and pages are in use at a time.
  const bool down = from_stride < to_stride;
  const int64_t outer_end = down ? columns : rows;
  const int64_t inner_end = down ? rows : columns;
  for (int64_t outer = 0; outer < outer_end; outer += kBlock) {
    for (int64_t inner = 0; inner < inner_end; inner += kBlock) {
      const int64_t r = down ? inner : outer;
      const int64_t c = down ? outer : inner;
      const From* source = from + r * from_stride + c;
      const T* add = bias == nullptr ? nullptr : bias + c;
      To* target = to + c * to_stride + r;
      if (r + kBlock <= rows && c + kBlock <= columns) {
        transpose_block<From, To, kAdd>(
            source, from_stride, add, target, to_stride);
        continue;
      }
      for (int64_t j = 0; j < std::min(kBlock, columns - c); ++j) {
        for (int64_t i = 0; i < std::min(kBlock, rows - r); ++i) {
          transpose_element<From, To, kAdd>(
              source + i * from_stride + j,
              add == nullptr ? nullptr : add + j,
              target + j * to_stride + i);
        }
      }
    }
  }
}

} // namespace

#define DCN_DEFINE_TRANSPOSE(From, To, kAdd, T)                 \
  template <>                                                   \
  DCN_VECTOR_CLONES void transpose<From, To, kAdd, T>(          \
      const From* from,                                         \
      int64_t from_stride,                                      \
      int64_t rows,                                             \
      int64_t columns,                                          \
      const T* bias,                                            \
      To* to,                                                   \
      int64_t to_stride) {                                      \
    transpose_body<From, To, kAdd>(                             \
        from, from_stride, rows, columns, bias, to, to_stride); \
  }

DCN_DEFINE_TRANSPOSE(double, double, false, double)
DCN_DEFINE_TRANSPOSE(double, double, true, double)
DCN_DEFINE_TRANSPOSE(float, float, false, float)
DCN_DEFINE_TRANSPOSE(float, float, true, float)
DCN_DEFINE_TRANSPOSE(c10::Half, float, false, float)
DCN_DEFINE_TRANSPOSE(c10::BFloat16, float, false, float)
DCN_DEFINE_TRANSPOSE(c10::BFloat16, c10::BFloat16, false, float)
DCN_DEFINE_TRANSPOSE(float, c10::Half, false, float)
DCN_DEFINE_TRANSPOSE(float, c10::Half, true, float)
DCN_DEFINE_TRANSPOSE(float, c10::BFloat16, false, float)
DCN_DEFINE_TRANSPOSE(float, c10::BFloat16, true, float)
#undef DCN_DEFINE_TRANSPOSE

} // namespace dcn::cpu
