// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "cpu/conv/gemm.h"

#include <exception>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/util/Exception.h>

// Batch-reduce GEMM (brgemm) of oneDNN. ATen installs this header, but does not
// guarantee it. In float32 it reaches 97 % of the processor's peak, MKL 82 %
// (docs/performance.md).
#if __has_include(<ATen/native/CPUBlas.h>) && !defined(DCN_PORTABLE)
#include <ATen/native/CPUBlas.h>
#endif

namespace dcn::cpu {
namespace {

template <typename T>
at::Tensor as_tensor(const Matrix<T>& matrix) {
  using Element = std::remove_const_t<T>;
  return at::from_blob(
      const_cast<Element*>(matrix.data),
      {matrix.rows, matrix.columns},
      {matrix.stride, 1},
      at::TensorOptions().dtype(c10::CppTypeToScalarType<Element>::value));
}

// BLAS and oneDNN require this, even of a matrix with a single row.
template <typename T>
void check_leading_dimension(const Matrix<T>& matrix) {
  TORCH_INTERNAL_ASSERT(
      matrix.stride >= matrix.columns,
      "leading dimension ",
      matrix.stride,
      " of a matrix with ",
      matrix.columns,
      " columns");
}

template <typename A, typename T>
void check_leading_dimensions(
    const Matrix<const A>& a,
    const Matrix<const A>& b,
    const Matrix<T>& result) {
  check_leading_dimension(a);
  check_leading_dimension(b);
  check_leading_dimension(result);
}

#if defined(CPUBLAS_BRGEMM_F32F32F32) || defined(CPUBLAS_BRGEMM_BF16BF16F32)
template <typename C>
void brgemm(
    const Matrix<const C>& a,
    const Matrix<const C>& b,
    const Matrix<float>& result,
    Store store) {
  at::native::cpublas::brgemm(
      a.rows,
      b.columns,
      a.columns,
      a.stride,
      b.stride,
      result.stride,
      store == Store::kAdd,
      a.data,
      b.data,
      result.data,
      OperandLayout<C>::kVnni);
}
#endif

// `second` is null where the number of rows is odd: zeros.
DCN_INLINE void interleave_rows(
    const float* first,
    const float* second,
    int64_t columns,
    c10::BFloat16* packed) {
  if (second == nullptr) {
    for (int64_t i = 0; i < columns; ++i) {
      packed[2 * i] = round_to<c10::BFloat16>(first[i]);
      packed[2 * i + 1] = c10::BFloat16(0.0f);
    }
  } else {
    for (int64_t i = 0; i < columns; ++i) {
      packed[2 * i] = round_to<c10::BFloat16>(first[i]);
      packed[2 * i + 1] = round_to<c10::BFloat16>(second[i]);
    }
  }
}

} // namespace

DCN_VECTOR_CLONES void pack_vnni(
    const float* matrix,
    int64_t rows,
    int64_t columns,
    c10::BFloat16* packed) {
  for (int64_t row = 0; row < rows; row += 2) {
    const float* first = matrix + row * columns;
    interleave_rows(
        first,
        row + 1 < rows ? first + columns : nullptr,
        columns,
        packed + row * columns);
  }
}

namespace {

void blas_gemm(
    const at::Tensor& a,
    const at::Tensor& b,
    at::Tensor result,
    Store store) {
  if (store == Store::kAdd) {
    result.addmm_(a, b);
  } else {
    at::mm_out(result, a, b);
  }
}

} // namespace

template <typename T>
void gemm(
    const Matrix<const T>& a,
    const Matrix<const T>& b,
    const Matrix<T>& result,
    Store store) {
  check_leading_dimensions(a, b, result);
#if defined(CPUBLAS_BRGEMM_F32F32F32)
  if constexpr (std::is_same_v<T, float>) {
    brgemm(a, b, result, store);
    return;
  }
#endif
  blas_gemm(as_tensor(a), as_tensor(b), as_tensor(result), store);
}

void gemm_transposed(
    const Matrix<const float>& a,
    const Matrix<const float>& b,
    const Matrix<float>& result,
    Store store) {
  check_leading_dimensions(a, b, result);
  blas_gemm(as_tensor(a), as_tensor(b).t(), as_tensor(result), store);
}

template void gemm(
    const Matrix<const float>&,
    const Matrix<const float>&,
    const Matrix<float>&,
    Store);
template void gemm(
    const Matrix<const double>&,
    const Matrix<const double>&,
    const Matrix<double>&,
    Store);

template <>
bool has_independent_rows<double>() {
  return false; // BLAS chooses its kernels by the sizes
}

template <>
bool has_independent_rows<float>() {
#if defined(CPUBLAS_BRGEMM_F32F32F32)
  return true;
#else
  return false;
#endif
}

template <>
bool has_independent_rows<c10::BFloat16>() {
  return true;
}

#if defined(CPUBLAS_BRGEMM_BF16BF16F32)

void gemm(
    const Matrix<const c10::BFloat16>& a,
    const Matrix<const c10::BFloat16>& b,
    const Matrix<float>& result,
    Store store) {
  check_leading_dimensions(a, b, result);
  brgemm(a, b, result, store);
}

void release_bfloat16_gemm() {
  at::native::cpublas::brgemm_release();
}

bool has_bfloat16_gemm() {
  // Without such instructions bfloat16 is slower than float32.
  // ONEDNN_MAX_CPU_ISA may forbid oneDNN to use them, so one GEMM is tried.
  static const bool has = [] {
    if (!DCN_HAS_BFLOAT16_UNITS()) {
      return false;
    }
    constexpr int64_t kSize = 64;
    const std::vector<c10::BFloat16> operand(kSize * kSize);
    std::vector<float> result(kSize * kSize);
    try {
      gemm(
          {operand.data(), kSize, kSize, kSize},
          {operand.data(), kSize, kSize, kSize},
          {result.data(), kSize, kSize, kSize},
          Store::kOverwrite);
    } catch (const std::exception&) {
      return false;
    }
    release_bfloat16_gemm();
    return true;
  }();
  return has;
}

#else

void gemm(
    const Matrix<const c10::BFloat16>&,
    const Matrix<const c10::BFloat16>&,
    const Matrix<float>&,
    Store) {
  TORCH_INTERNAL_ASSERT(false, "built without bfloat16 GEMM");
}

void release_bfloat16_gemm() {}

bool has_bfloat16_gemm() {
  return false;
}

#endif

} // namespace dcn::cpu
