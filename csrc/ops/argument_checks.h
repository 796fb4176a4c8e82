// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Argument checks shared by all ops. They run before anything is allocated.
#pragma once

#include <limits>
#include <optional>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>

#include "math/macros.h"

namespace dcn {

using OptionalTensor = std::optional<at::Tensor>;

// Heights, widths, kernel sizes and strides are stored as int.
constexpr int64_t kMaxExtent = std::numeric_limits<int>::max();

struct Size2d {
  int h;
  int w;

  DCN_INLINE int64_t count() const {
    return int64_t{h} * w;
  }
};

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

// Returns a (height, width), both at least `min`.
inline Size2d check_pair(
    const char* op,
    const char* name,
    at::IntArrayRef values,
    int64_t min) {
  TORCH_CHECK_VALUE(
      values.size() == 2,
      op,
      ": ",
      name,
      " must be two integers (height, width), got ",
      values);
  for (const int64_t value : values) {
    TORCH_CHECK_VALUE(
        value >= min && value <= kMaxExtent,
        op,
        ": ",
        name,
        " must be from ",
        min,
        " to ",
        kMaxExtent,
        ", got ",
        values);
  }
  return {static_cast<int>(values[0]), static_cast<int>(values[1])};
}

// Channels-last only if the tensor is not contiguous too (as with one channel).
inline at::MemoryFormat memory_format_of(const at::Tensor& tensor) {
  return !tensor.is_contiguous() &&
          tensor.is_contiguous(at::MemoryFormat::ChannelsLast)
      ? at::MemoryFormat::ChannelsLast
      : at::MemoryFormat::Contiguous;
}

// Allocates the gradient of `tensor`, or an empty tensor if it is not needed.
inline at::Tensor allocate_gradient(const at::Tensor& tensor, bool is_needed) {
  return is_needed
      ? at::empty_like(tensor, tensor.options(), memory_format_of(tensor))
      : at::empty({0}, tensor.options());
}

} // namespace dcn
