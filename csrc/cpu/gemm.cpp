// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "cpu/gemm.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

namespace dcn {
namespace {

template <typename T>
at::Tensor as_tensor(const Matrix<T>& matrix) {
  return at::from_blob(
      matrix.data,
      {matrix.rows, matrix.columns},
      {matrix.row_stride, matrix.column_stride},
      at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value));
}

} // namespace

template <typename T>
void gemm(
    const Matrix<T>& a,
    const Matrix<T>& b,
    const Matrix<T>& result,
    Store store) {
  at::Tensor out = as_tensor(result);
  if (store == Store::kAdd) {
    out.addmm_(as_tensor(a), as_tensor(b));
  } else {
    at::mm_out(out, as_tensor(a), as_tensor(b));
  }
}

template void gemm(
    const Matrix<float>&,
    const Matrix<float>&,
    const Matrix<float>&,
    Store);
template void gemm(
    const Matrix<double>&,
    const Matrix<double>&,
    const Matrix<double>&,
    Store);

} // namespace dcn
