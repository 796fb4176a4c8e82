// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Host side of deformable convolution: argument checks and allocation.

#pragma once

#include <array>
#include <tuple>
#include <vector>

#include <ATen/core/Tensor.h>

#include "math/deform_tap.h"
#include "ops/argument_checks.h"

namespace dcn {

// Input channels [begin, begin + size) of one convolution group and one offset
// group. Neither number of groups has to divide the other.
struct ChannelSlice {
  int64_t begin;
  int64_t size;
  int64_t group;
  int64_t offset_group;
};

// The checked sizes of a call.
struct DeformConvShape {
  int64_t batch;
  int64_t in_channels;
  int64_t out_channels;
  int64_t groups;
  int64_t offset_groups;
  ConvGeometry geometry;

  int64_t group_in() const {
    return in_channels / groups;
  }
  int64_t group_out() const {
    return out_channels / groups;
  }
  int64_t channels_per_offset_group() const {
    return in_channels / offset_groups;
  }
  // The slices in channel order, each of at most `max_channels` channels.
  std::vector<ChannelSlice> slices(int64_t max_channels) const;
};

struct ForwardInputs {
  const at::Tensor& input;
  const at::Tensor& offset;
  const at::Tensor& weight;
  const OptionalTensor& bias;
  const OptionalTensor& mask;
};

struct BackwardInputs {
  const DeformConvShape& shape;
  const at::Tensor& grad_output;
  const at::Tensor& input;
  const at::Tensor& offset;
  const OptionalTensor& mask;
};

struct DeformConvGradients {
  at::Tensor input, offset, weight, bias, mask; // empty where not needed
};

// Throws if the arguments are not valid.
DeformConvShape check_deform_conv2d(
    const at::Tensor& input,
    const at::Tensor& offset,
    const at::Tensor& weight,
    const OptionalTensor& bias,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    const OptionalTensor& mask);

void check_grad_output(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const DeformConvShape& shape);

// Allocates the output in the memory format of the input.
at::Tensor allocate_output(
    const at::Tensor& input,
    const DeformConvShape& shape);

// Allocates the gradients selected by `output_mask` (input, offset, weight,
// bias, mask), each in the memory format of its tensor.
DeformConvGradients allocate_gradients(
    const at::Tensor& input,
    const at::Tensor& offset,
    const at::Tensor& weight,
    const OptionalTensor& mask,
    std::array<bool, 5> output_mask);

// Packs the weight as (groups, group_out, taps, group_in), the order of the
// columns, contiguous, in `dtype`.
at::Tensor pack_weight(
    const at::Tensor& weight,
    const DeformConvShape& shape,
    at::ScalarType dtype);

} // namespace dcn
