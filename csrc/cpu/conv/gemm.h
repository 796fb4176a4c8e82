// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Matrix products on the calling thread.
#pragma once

#include <cstdint>
#include <type_traits>

#include <c10/util/BFloat16.h>

namespace dcn::cpu {

// A row-major matrix inside somebody else's memory.
template <typename T>
struct Matrix {
  T* data;
  int64_t rows;
  int64_t columns;
  int64_t stride; // from row to row
};

enum class Store { kOverwrite, kAdd };

// result = a * b, or result += a * b.
template <typename T>
void gemm(
    const Matrix<const T>& a,
    const Matrix<const T>& b,
    const Matrix<T>& result,
    Store store);

// bfloat16 factors, sums in float32: by the processor's own units, so only
// where has_bfloat16_gemm(). They multiply two terms at a time: the inner
// extent is even, and `b` has its rows in pairs (see Packing).
void gemm(
    const Matrix<const c10::BFloat16>& a,
    const Matrix<const c10::BFloat16>& b,
    const Matrix<float>& result,
    Store store);

bool has_bfloat16_gemm();

// After the bfloat16 products of a thread: gives back what the processor keeps
// for them (the tiles of AMX).
void release_bfloat16_gemm();

// How the right factor of a product of C lies in memory.
template <typename C>
struct OperandLayout {
  static constexpr bool kVnni = std::is_same_v<C, c10::BFloat16>;

  // Rows of the right factor, and with them columns of the left one.
  static constexpr int64_t padded_k(int64_t extent) {
    return kVnni ? (extent + 1) / 2 * 2 : extent;
  }
  // Where element (row, 0) is; in pairs, the two rows alternate.
  static constexpr int64_t row(int64_t row, int64_t stride) {
    return kVnni ? row / 2 * 2 * stride + row % 2 : row * stride;
  }
  // From column to column.
  static constexpr int64_t kColumnStep = kVnni ? 2 : 1;
};

// After the products of a thread.
template <typename C>
void release_gemm() {
  if constexpr (OperandLayout<C>::kVnni) {
    release_bfloat16_gemm();
  }
}

} // namespace dcn::cpu
