// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include <ATen/Dispatch.h>
#include <torch/library.h>

#include "cpu/deform_conv2d_backward.h"
#include "cpu/deform_conv2d_forward.h"
#include "cpu/parallel.h"
#include "ops/deform_conv2d.h"
#include "ops/map_view.h"

namespace dcn {
namespace {

template <typename S>
using opmath_t = std::conditional_t<std::is_same_v<S, double>, double, float>;

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
  at::Tensor output = allocate_output(input, shape);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, input.scalar_type(), "deform_conv2d", [&] {
        deform_conv2d_forward<scalar_t, opmath_t<scalar_t>>(
            shape, {input, offset, weight, bias, mask}, output);
      });
  return output;
}

// Sum of grad_output over images and positions, in order, in float64.
template <typename S>
void bias_gradient(const at::Tensor& grad_output, const at::Tensor& result) {
  constexpr int64_t kChannels = 32; // a task's share: a cache line or two
  const int64_t channels = grad_output.size(1);
  const int64_t tasks = (channels + kChannels - 1) / kChannels;
  parallel_tasks(tasks, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * kChannels;
      const int64_t count = std::min(kChannels, channels - first);
      double sums[kChannels] = {};
      for (int64_t n = 0; n < grad_output.size(0); ++n) {
        const auto map = map_view<const S>(grad_output, n, first);
        for (int64_t y = 0; y < grad_output.size(2); ++y) {
          for (int64_t x = 0; x < grad_output.size(3); ++x) {
            const S* pixel = map.pixel(y, x);
            for (int64_t c = 0; c < count; ++c) {
              sums[c] += static_cast<double>(pixel[c * map.channel_stride]);
            }
          }
        }
      }
      for (int64_t c = 0; c < count; ++c) {
        result.data_ptr<S>()[first + c] = static_cast<S>(sums[c]);
      }
    }
  });
}

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
    std::array<bool, 5> wanted) {
  const auto shape = check_deform_conv2d(
      input, offset, weight, std::nullopt, stride, padding, dilation, mask);
  check_grad_output(grad_output, input, shape);
  const auto gradients =
      allocate_gradients(input, offset, weight, mask, wanted);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf,
      at::kBFloat16,
      input.scalar_type(),
      "_deform_conv2d_backward",
      [&] {
        DeformConvBackward<scalar_t, opmath_t<scalar_t>>(
            {shape, grad_output, input, offset, mask}, weight, gradients)
            .run();
        if (wanted[3]) {
          bias_gradient<scalar_t>(grad_output, gradients.bias);
        }
      });
  return {
      gradients.input,
      gradients.offset,
      gradients.weight,
      gradients.bias,
      gradients.mask};
}

} // namespace
} // namespace dcn

TORCH_LIBRARY_IMPL(dcn_plugin, CPU, m) {
  m.impl("deform_conv2d", TORCH_FN(dcn::deform_conv2d));
  m.impl("_deform_conv2d_backward", TORCH_FN(dcn::deform_conv2d_backward));
}
