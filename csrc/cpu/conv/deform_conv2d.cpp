// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Registers the CPU kernels of deformable convolution.

#include "cpu/conv/deform_conv2d.h"

#include <ATen/Dispatch.h>

#include "cpu/conv/gemm.h"
#include "cpu/parallel.h"
#include "ops/any_dtype_view.h"
#include "ops/deform_conv2d_op.h"
#include "ops/feature_map_view.h"

namespace dcn::cpu {
namespace {

// Sums grad_output over images and positions, in order, in float64.
template <typename S>
void bias_gradient(const at::Tensor& grad_output, const at::Tensor& result) {
  constexpr int64_t kChannels = 32; // of a task: one or two cache lines
  const int64_t channels = grad_output.size(1);
  const int64_t tasks = (channels + kChannels - 1) / kChannels;
  parallel_tasks(tasks, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * kChannels;
      const int64_t count = std::min(kChannels, channels - first);
      double sums[kChannels] = {};
      for (int64_t n = 0; n < grad_output.size(0); ++n) {
        const auto map = feature_map_view<const S>(grad_output, n, first);
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

// Calls body with a value of the dtype of the GEMM operands for tensors of S.
template <typename S, typename Body>
void dispatch_operand_dtype(const Body& body) {
  if constexpr (std::is_same_v<S, c10::BFloat16>) {
    if (has_bfloat16_gemm()) {
      body(S());
      return;
    }
  }
  body(OpMathType<S>());
}

struct Device {
  static void forward(
      const DeformConvShape& shape,
      const ForwardInputs& inputs,
      const at::Tensor& output) {
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, output.scalar_type(), "deform_conv2d", [&] {
          dispatch_operand_dtype<scalar_t>([&](auto operand) {
            deform_conv2d_forward<
                scalar_t,
                OpMathType<scalar_t>,
                decltype(operand)>(shape, inputs, output);
          });
        });
  }

  static void backward(
      const BackwardInputs& inputs,
      const at::Tensor& weight,
      const DeformConvGradients& gradients) {
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf,
        at::kBFloat16,
        weight.scalar_type(),
        "_deform_conv2d_backward",
        [&] {
          dispatch_operand_dtype<scalar_t>([&](auto operand) {
            deform_conv2d_backward<
                scalar_t,
                OpMathType<scalar_t>,
                decltype(operand)>(inputs, weight, gradients);
          });
          if (gradients.bias.numel() > 0) {
            bias_gradient<scalar_t>(inputs.grad_output, gradients.bias);
          }
        });
  }
};

} // namespace
} // namespace dcn::cpu

TORCH_LIBRARY_IMPL(dcn_plugin, CPU, m) {
  dcn::register_deform_conv2d<dcn::cpu::Device>(m);
}
