// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include <cstdint>

namespace dcn {

// A matrix inside somebody else's memory.
template <typename T>
struct Matrix {
  T* data;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  int64_t column_stride;

  Matrix transposed() const {
    return {data, columns, rows, column_stride, row_stride};
  }
};

template <typename T>
Matrix<T> row_major(T* data, int64_t rows, int64_t columns) {
  return {data, rows, columns, columns, 1};
}

enum class Store { kOverwrite, kAdd };

// result = a * b, or result += a * b.
template <typename T>
void gemm(
    const Matrix<T>& a,
    const Matrix<T>& b,
    const Matrix<T>& result,
    Store store);

} // namespace dcn
