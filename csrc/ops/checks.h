// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Checks that every op makes of its arguments, before anything is allocated.
#pragma once

#include <array>
#include <limits>

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace dcn {

// Heights, widths, kernel sizes and strides are kept as int.
constexpr int64_t kMaxExtent = std::numeric_limits<int>::max();

inline void check_float_tensor(
    const char* op,
    const char* name,
    const at::Tensor& tensor,
    int64_t dim,
    const char* shape) {
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kDouble || dtype == at::kFloat || dtype == at::kHalf ||
          dtype == at::kBFloat16,
      op,
      ": ",
      name,
      " must be float64, float32, float16 or bfloat16, got ",
      dtype);
  TORCH_CHECK_VALUE(
      tensor.layout() == at::kStrided,
      op,
      ": ",
      name,
      " must be a dense tensor, got layout ",
      tensor.layout());
  TORCH_CHECK_VALUE(
      tensor.dim() == dim,
      op,
      ": ",
      name,
      " must be a ",
      dim,
      "-dimensional tensor ",
      shape,
      ", got shape ",
      tensor.sizes());
}

inline void check_same_dtype(
    const char* op,
    const char* name,
    const at::Tensor& tensor,
    const at::Tensor& input) {
  TORCH_CHECK_TYPE(
      tensor.scalar_type() == input.scalar_type(),
      op,
      ": ",
      name,
      " must have the input's dtype ",
      input.scalar_type(),
      ", got ",
      tensor.scalar_type());
}

inline void check_same_device(
    const char* op,
    const char* name,
    const at::Tensor& tensor,
    const at::Tensor& input) {
  TORCH_CHECK_VALUE(
      tensor.device() == input.device(),
      op,
      ": ",
      name,
      " must be on the input's device ",
      input.device(),
      ", got ",
      tensor.device());
}

// Channels-last only where the strides leave no doubt.
inline at::MemoryFormat memory_format_of(const at::Tensor& tensor) {
  return !tensor.is_contiguous() &&
          tensor.is_contiguous(at::MemoryFormat::ChannelsLast)
      ? at::MemoryFormat::ChannelsLast
      : at::MemoryFormat::Contiguous;
}

} // namespace dcn
