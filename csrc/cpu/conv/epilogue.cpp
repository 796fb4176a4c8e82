// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "cpu/conv/epilogue.h"

#include <algorithm>

#include <c10/util/Half.h>

#include "cpu/conv/rounding.h"

namespace dcn::cpu {
namespace {

template <typename S, typename T>
DCN_INLINE void store_contiguous(
    const T* values,
    int64_t stride,
    const T* bias,
    int64_t rows,
    int64_t columns,
    S* to,
    int64_t row_step) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = values + r * stride;
    S* row = to + r * row_step;
    if (bias == nullptr) {
      for (int64_t c = 0; c < columns; ++c) {
        row[c] = round_to<S>(from[c]);
      }
    } else {
      for (int64_t c = 0; c < columns; ++c) {
        row[c] = round_to<S>(from[c] + bias[c]);
      }
    }
  }
}

// In tiles, so that what is read across stays in cache.
template <typename S, typename T>
DCN_INLINE void store_transposed(
    const T* values,
    int64_t stride,
    const T* bias,
    int64_t rows,
    int64_t columns,
    S* to,
    int64_t row_step,
    int64_t column_step) {
  constexpr int64_t kTile = 16;
  for (int64_t first = 0; first < columns; first += kTile) {
    const int64_t last = std::min(first + kTile, columns);
    for (int64_t c = first; c < last; ++c) {
      const T add = bias == nullptr ? T(0) : bias[c];
      const T* from = values + c;
      S* column = to + c * column_step;
      for (int64_t r = 0; r < rows; ++r) {
        column[r * row_step] = round_to<S>(from[r * stride] + add);
      }
    }
  }
}

} // namespace

#define DCN_DEFINE_STORE(S, T)                                             \
  template <>                                                              \
  DCN_VECTOR_CLONES void store_epilogue(                                   \
      const T* values,                                                     \
      int64_t stride,                                                      \
      const T* bias,                                                       \
      int64_t rows,                                                        \
      int64_t columns,                                                     \
      S* to,                                                               \
      int64_t row_step,                                                    \
      int64_t column_step) {                                               \
    if (column_step == 1) {                                                \
      store_contiguous(values, stride, bias, rows, columns, to, row_step); \
    } else {                                                               \
      store_transposed(                                                    \
          values, stride, bias, rows, columns, to, row_step, column_step); \
    }                                                                      \
  }

DCN_DEFINE_STORE(double, double)
DCN_DEFINE_STORE(float, float)
DCN_DEFINE_STORE(c10::Half, float)
DCN_DEFINE_STORE(c10::BFloat16, float)
#undef DCN_DEFINE_STORE

} // namespace dcn::cpu
