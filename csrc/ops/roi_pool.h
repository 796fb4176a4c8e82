// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include <array>
#include <string_view>

#include <ATen/core/Tensor.h>

#include "math/roi_bin.h"
#include "ops/argument_checks.h"

namespace dcn {

// Everything that follows from the arguments of a RoI pooling, checked. Plain
// RoI pooling has one group, position-sensitive pooling several.
struct RoiPoolShape {
  RoiMode mode;
  int64_t rois;
  int64_t batch;
  int64_t channels; // of the output
  int64_t classes; // with offsets of their own, dividing the channels
  Size2d map;
  Size2d bins;
  Size2d parts; // cells of an offset plane
  Size2d groups;
  int64_t sampling_ratio;
  double spatial_scale;
  double gamma;

  DCN_INLINE int64_t channels_per_class() const {
    return channels / classes;
  }
  // Where the channels of bin (i, j) start: channel c of the output is channel
  // c * groups.count() + group_of(i, j) of the input.
  DCN_INLINE int group_of(int i, int j) const {
    return static_cast<int>(int64_t{i} * groups.h / bins.h) * groups.w +
        static_cast<int>(int64_t{j} * groups.w / bins.w);
  }
};

// The arguments that both passes share.
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

// Throws unless the arguments describe a RoI pooling; allocates nothing.
RoiPoolShape check_roi_pool(const RoiPoolArguments& arguments);

void check_roi_grad_output(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const RoiPoolShape& shape);

at::Tensor allocate_roi_pool_output(
    const at::Tensor& input,
    const RoiPoolShape& shape);

struct RoiPoolGradients {
  at::Tensor input, offset; // those not asked for are empty
};

RoiPoolGradients allocate_roi_pool_gradients(
    const RoiPoolArguments& arguments,
    std::array<bool, 2> output_mask);

} // namespace dcn
