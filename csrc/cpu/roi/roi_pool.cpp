// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Registers the CPU kernels of RoI pooling.

#include "cpu/roi/roi_pool.h"

#include <ATen/Dispatch.h>

#include "ops/roi_pool_op.h"

namespace dcn::cpu {
namespace {

struct Device {
  static constexpr bool kChecksBatchIndices = true;

  static void forward(
      const RoiGeometry& geometry,
      const at::Tensor& input,
      const at::Tensor& output) {
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, input.scalar_type(), "deform_roi_pool", [&] {
          roi_pool_forward<scalar_t, OpMathType<scalar_t>>(
              geometry, input, output);
        });
  }

  static void backward(
      const RoiGeometry& geometry,
      const at::Tensor& grad_output,
      const at::Tensor& input,
      const RoiPoolGradients& gradients) {
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf,
        at::kBFloat16,
        input.scalar_type(),
        "_deform_roi_pool_backward",
        [&] {
          roi_pool_backward<scalar_t, OpMathType<scalar_t>>(
              geometry, grad_output, input, gradients);
        });
  }
};

} // namespace
} // namespace dcn::cpu

TORCH_LIBRARY_IMPL(dcn_plugin, CPU, m) {
  dcn::register_roi_pool<dcn::cpu::Device>(m);
}
