// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Autocast: input, weight, bias and mask are cast to the autocast dtype.
// Offsets and boxes are not: in bfloat16 a coordinate of 8 pixels has a
// resolution of 1/16 pixel.

#include <string_view>
#include <type_traits>

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "ops/argument_checks.h"

namespace dcn {
namespace {

// Finds the op of this name; Function has its signature.
template <typename Function>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(name, "")
      .typed<std::remove_pointer_t<Function>>();
}

template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor deform_conv2d(
    const at::Tensor& input,
    const at::Tensor& offset,
    const at::Tensor& weight,
    const OptionalTensor& bias,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    const OptionalTensor& mask) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  static const auto op = find_op<decltype(&deform_conv2d<device, key>)>(
      "dcn_plugin::deform_conv2d");
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const at::Tensor& tensor) {
    return at::autocast::cached_cast(dtype, tensor, device);
  };
  const auto cast_optional = [&](const OptionalTensor& tensor) {
    return tensor ? OptionalTensor(cast(*tensor)) : tensor;
  };
  return op.call(
      cast(input),
      offset,
      cast(weight),
      cast_optional(bias),
      stride,
      padding,
      dilation,
      cast_optional(mask));
}

template <c10::DeviceType device, c10::DispatchKey key>
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
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  static const auto op = find_op<decltype(&deform_roi_pool<device, key>)>(
      "dcn_plugin::deform_roi_pool");
  return op.call(
      at::autocast::cached_cast(
          at::autocast::get_autocast_dtype(device), input, device),
      boxes,
      offset,
      output_size,
      part_size,
      group_size,
      spatial_scale,
      sampling_ratio,
      gamma,
      mode);
}

template <c10::DeviceType device, c10::DispatchKey key>
void register_kernels(torch::Library& m) {
  m.impl("deform_conv2d", TORCH_FN((deform_conv2d<device, key>)));
  m.impl("deform_roi_pool", TORCH_FN((deform_roi_pool<device, key>)));
}

} // namespace
} // namespace dcn

TORCH_LIBRARY_IMPL(dcn_plugin, AutocastCPU, m) {
  dcn::register_kernels<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>(m);
}

TORCH_LIBRARY_IMPL(dcn_plugin, AutocastCUDA, m) {
  dcn::register_kernels<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>(
      m);
}
