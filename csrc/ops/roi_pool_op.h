// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// The registered ops of RoI pooling, for both devices. A Device has
//   forward(source, input, output)
//   backward(source, grad_output, input, gradients)
// which fill the tensors that are allocated here, and kChecksBatchIndices.
#pragma once

#include <tuple>

#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "ops/roi_geometry.h"

namespace dcn {

template <typename Device>
at::Tensor deform_roi_pool(
    const at::Tensor& input,
    const at::Tensor& boxes,
    const OptionalTensor& offset,
    at::IntArrayRef output_size,
    at::IntArrayRef part_size,
    at::IntArrayRef group_size,
    double spatial_scale,
    int64_t sampling_ratio,
    double gamma,
    std::string_view mode) {
  const auto shape = check_roi_pool(
      {input,
       boxes,
       offset,
       output_size,
       part_size,
       group_size,
       spatial_scale,
       sampling_ratio,
       gamma,
       mode},
      Device::kChecksBatchIndices);
  const c10::DeviceGuard guard(input.device());
  const at::Tensor output = allocate_roi_pool_output(input, shape);
  if (shape.rois > 0) { // otherwise there may be any number of bins
    Device::forward(roi_geometry(shape, boxes, offset), input, output);
  }
  return output;
}

template <typename Device>
std::tuple<at::Tensor, at::Tensor> deform_roi_pool_backward(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const at::Tensor& boxes,
    const OptionalTensor& offset,
    at::IntArrayRef output_size,
    at::IntArrayRef part_size,
    at::IntArrayRef group_size,
    double spatial_scale,
    int64_t sampling_ratio,
    double gamma,
    std::string_view mode,
    std::array<bool, 2> output_mask) {
  const RoiPoolArguments arguments{
      input,
      boxes,
      offset,
      output_size,
      part_size,
      group_size,
      spatial_scale,
      sampling_ratio,
      gamma,
      mode};
  const auto shape = check_roi_pool(arguments, Device::kChecksBatchIndices);
  check_roi_grad_output(grad_output, input, shape);
  const c10::DeviceGuard guard(input.device());
  const auto gradients = allocate_roi_pool_gradients(arguments, output_mask);
  if (shape.rois > 0) {
    Device::backward(
        roi_geometry(shape, boxes, offset), grad_output, input, gradients);
  } else {
    gradients.input.zero_();
  }
  return {gradients.input, gradients.offset};
}

template <typename Device>
void register_roi_pool(torch::Library& m) {
  m.impl("deform_roi_pool", TORCH_FN(deform_roi_pool<Device>));
  m.impl(
      "_deform_roi_pool_backward", TORCH_FN(deform_roi_pool_backward<Device>));
}

} // namespace dcn
