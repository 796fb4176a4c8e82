// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Under autocast what is multiplied is cast to the autocast dtype; coordinates
// (offsets, boxes) never are: bfloat16 resolves 1/16 pixel at 8 pixels.

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "ops/deform_conv2d.h"

namespace dcn {
namespace {

template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor deform_conv2d_autocast(
    const at::Tensor& input,
    const at::Tensor& offset,
    const at::Tensor& weight,
    const OptionalTensor& bias,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    const OptionalTensor& mask) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("dcn_plugin::deform_conv2d", "")
                             .typed<at::Tensor(
                                 const at::Tensor&,
                                 const at::Tensor&,
                                 const at::Tensor&,
                                 const OptionalTensor&,
                                 at::IntArrayRef,
                                 at::IntArrayRef,
                                 at::IntArrayRef,
                                 const OptionalTensor&)>();
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

} // namespace
} // namespace dcn

TORCH_LIBRARY_IMPL(dcn_plugin, AutocastCPU, m) {
  m.impl(
      "deform_conv2d",
      TORCH_FN((dcn::deform_conv2d_autocast<
                c10::DeviceType::CPU,
                c10::DispatchKey::AutocastCPU>)));
}

TORCH_LIBRARY_IMPL(dcn_plugin, AutocastCUDA, m) {
  m.impl(
      "deform_conv2d",
      TORCH_FN((dcn::deform_conv2d_autocast<
                c10::DeviceType::CUDA,
                c10::DispatchKey::AutocastCUDA>)));
}
