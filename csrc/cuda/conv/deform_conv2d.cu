// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Registers the CUDA kernels of deformable convolution.

#include "cuda/conv/deform_conv2d.cuh"
#include "cuda/launch.cuh"
#include "ops/deform_conv2d_op.h"

namespace dcn::cuda {
namespace {

struct Device {
  static constexpr auto forward = deform_conv2d_forward;
  static constexpr auto backward = deform_conv2d_backward;
};

} // namespace
} // namespace dcn::cuda

TORCH_LIBRARY_IMPL(dcn_plugin, DCN_CUDA_DISPATCH_KEY, m) {
  dcn::register_deform_conv2d<dcn::cuda::Device>(m);
}
