// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// The registered ops of deformable convolution, for both devices. A Device has
//   forward(shape, inputs, output)
//   backward(inputs, weight, gradients)
// which fill the tensors that are allocated here.
#pragma once

#include <tuple>

#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "ops/deform_conv2d.h"

namespace dcn {

template <typename Device>
at::Tensor deform_conv2d(
    const at::Tensor& input,
    const at::Tensor& offset,
    const at::Tensor& weight,
    const OptionalTensor& bias,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    const OptionalTensor& mask) {
  const auto shape = check_deform_conv2d(
      input, offset, weight, bias, stride, padding, dilation, mask);
  const c10::DeviceGuard guard(input.device());
  const at::Tensor output = allocate_output(input, shape);
  Device::forward(shape, {input, offset, weight, bias, mask}, output);
  return output;
}

template <typename Device>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
deform_conv2d_backward(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const at::Tensor& offset,
    const at::Tensor& weight,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    const OptionalTensor& mask,
    std::array<bool, 5> output_mask) {
  const auto shape = check_deform_conv2d(
      input, offset, weight, std::nullopt, stride, padding, dilation, mask);
  check_grad_output(grad_output, input, shape);
  const c10::DeviceGuard guard(input.device());
  const auto gradients =
      allocate_gradients(input, offset, weight, mask, output_mask);
  Device::backward(
      {shape, grad_output, input, offset, mask}, weight, gradients);
  return {
      gradients.input,
      gradients.offset,
      gradients.weight,
      gradients.bias,
      gradients.mask};
}

template <typename Device>
void register_deform_conv2d(torch::Library& m) {
  m.impl("deform_conv2d", TORCH_FN(deform_conv2d<Device>));
  m.impl("_deform_conv2d_backward", TORCH_FN(deform_conv2d_backward<Device>));
}

} // namespace dcn
