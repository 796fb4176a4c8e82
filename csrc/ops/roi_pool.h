// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Host side of RoI pooling: argument checks and allocation.

#pragma once

#include <array>
#include <string_view>

#include <ATen/core/Tensor.h>

#include "math/roi_bin.h"
#include "ops/argument_checks.h"

namespace dcn {

// The checked arguments of a call. Position-sensitive pooling has several
// groups, other RoI pooling has one.
struct RoiPoolShape {
  RoiMode mode;
  int64_t rois;
  int64_t batch;
  int64_t channels; // of the output
  int64_t classes; // with separate offsets; divides the channels
  Size2d map;
  Size2d bins;
  Size2d parts; // spatial size of the offset tensor
  Size2d groups;
  int64_t sampling_ratio;
  double spatial_scale;
  double gamma;

  DCN_INLINE int64_t channels_per_class() const {
    return channels / classes;
  }
  // The group of bin (i, j). Its channel c is channel
  // c * groups.count() + group_of(i, j) of the input.
  DCN_INLINE int group_of(int i, int j) const {
    return static_cast<int>(int64_t{i} * groups.h / bins.h) * groups.w +
        static_cast<int>(int64_t{j} * groups.w / bins.w);
  }
};

// The arguments of both passes.
struct RoiPoolArguments {
  const at::Tensor& input;
  const at::Tensor& boxes;
  const OptionalTensor& offset;
  at::IntArrayRef output_size;
  at::IntArrayRef part_size;
  at::IntArrayRef group_size;
  double spatial_scale;
  int64_t sampling_ratio;
  double gamma;
  std::string_view mode;
};

// Throws if the arguments are not valid. To check batch indices on CUDA would
// synchronize with the GPU; its kernels give NaN for invalid ones.
RoiPoolShape check_roi_pool(
    const RoiPoolArguments& arguments,
    bool checks_batch_indices);

void check_roi_grad_output(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const RoiPoolShape& shape);

at::Tensor allocate_roi_pool_output(
    const at::Tensor& input,
    const RoiPoolShape& shape);

struct RoiPoolGradients {
  at::Tensor input, offset; // empty where not needed
};

RoiPoolGradients allocate_roi_pool_gradients(
    const RoiPoolArguments& arguments,
    std::array<bool, 2> output_mask);

} // namespace dcn
