// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include "cpu/copy_rows.h"
#include "ops/roi_source.h"

namespace dcn {

// Fills `output`. S is the dtype of the maps, T that of the sums.
template <typename S, typename T>
void roi_pool_forward(
    const RoiSource& source,
    const at::Tensor& input,
    const at::Tensor& output);

// Fills the gradients that are not empty.
template <typename S, typename T>
void roi_pool_backward(
    const RoiSource& source,
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const RoiPoolGradients& gradients);

// Output channels from `channel` on of a group of bins: every groups.count()-th
// channel of the input.
template <typename S>
MapView<S> group_view(
    const RoiPoolShape& shape,
    const at::Tensor& tensor,
    int64_t image,
    int group,
    int64_t channel) {
  const int64_t groups = shape.groups.count();
  auto view = map_view<S>(tensor, image, channel * groups + group);
  view.channel_stride *= groups;
  return view;
}

} // namespace dcn
