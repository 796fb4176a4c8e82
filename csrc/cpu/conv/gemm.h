// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// GEMM on the calling thread, and the layout of its operands. Called from
// deform_conv2d_forward.cpp and deform_conv2d_backward.cpp.
//
// C is the dtype of the operands. bfloat16 operands are in the VNNI layout that
// the instructions of the processor read: the right operand has each pair of
// rows interleaved, element by element, and the K dimension is padded with
// zeros to an even size.
//
// oneDNN compiles a kernel for each combination of sizes and strides and keeps
// it for the rest of the thread's life. So strides must not follow from the
// size of the feature map, and sizes that do are padded to padded_size().
#pragma once

#include <cstdint>
#include <type_traits>

#include <c10/util/BFloat16.h>

#include "cpu/round.h"

namespace dcn::cpu {

// A row-major matrix; does not own its memory.
template <typename T>
struct Matrix {
  T* data;
  int64_t rows;
  int64_t columns;
  int64_t stride; // from row to row, at least `columns`
};

// The next of a few sizes, at most 1/16 above `size` from 48 on: multiples of 4
// up to 128, of 8 up to 256, of 16 up to 512 and so on.
constexpr int64_t padded_size(int64_t size) {
  int64_t step = 4;
  while (size > 32 * step) {
    step *= 2;
  }
  return (size + step - 1) / step * step;
}

enum class Store { kOverwrite, kAdd };

// result = a * b, or result += a * b.
template <typename T>
void gemm(
    const Matrix<const T>& a,
    const Matrix<const T>& b,
    const Matrix<T>& result,
    Store store);

// result = a * transposed b, or result += a * transposed b, by BLAS: slower,
// but it compiles no kernels, so that the result may have the stride of a map.
void gemm_transposed(
    const Matrix<const float>& a,
    const Matrix<const float>& b,
    const Matrix<float>& result,
    Store store);

// bfloat16 operands in the VNNI layout, accumulated in float32. Requires
// has_bfloat16_gemm().
void gemm(
    const Matrix<const c10::BFloat16>& a,
    const Matrix<const c10::BFloat16>& b,
    const Matrix<float>& result,
    Store store);

// Whether a row of the result has the same bits whichever other rows are
// computed with it.
template <typename C>
bool has_independent_rows();

// Whether the processor has instructions for bfloat16 GEMMs.
bool has_bfloat16_gemm();

// Releases the AMX tile registers of the calling thread.
void release_bfloat16_gemm();

// To be called by a thread after its last GEMM.
template <typename C>
void release_gemm() {
  if constexpr (std::is_same_v<C, c10::BFloat16>) {
    release_bfloat16_gemm();
  }
}

template <typename C>
struct OperandLayout {
  static constexpr bool kVnni = std::is_same_v<C, c10::BFloat16>;

  // The size of the K dimension, with padding.
  static constexpr int64_t padded_k(int64_t k) {
    return kVnni ? (k + 1) / 2 * 2 : k;
  }
  // Offset of element (row, 0) of the right operand.
  static constexpr int64_t row_offset(int64_t row, int64_t stride) {
    return kVnni ? row / 2 * 2 * stride + row % 2 : row * stride;
  }
  // From column to column of the right operand.
  static constexpr int64_t kColumnStep = kVnni ? 2 : 1;
};

// Rounds a contiguous (rows, columns) matrix to bfloat16 and writes it in the
// VNNI layout of a right operand.
void pack_vnni(
    const float* matrix,
    int64_t rows,
    int64_t columns,
    c10::BFloat16* packed);

} // namespace dcn::cpu
