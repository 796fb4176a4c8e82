// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// The schemas of all ops. Kernels are registered in ops/autocast.cpp, cpu/ and
// cuda/; fake kernels, autograd formulas and documentation are in
// dcn_plugin/ops. The library is loaded by torch.ops.load_library and does not
// depend on Python, so one build serves all Python versions.

#include <torch/library.h>

TORCH_LIBRARY(dcn_plugin, m) {
  m.def(
      "deform_conv2d(Tensor input, Tensor offset, Tensor weight, "
      "Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, "
      "Tensor? mask) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  // Gradients of (input, offset, weight, bias, mask), selected by output_mask.
  m.def(
      "_deform_conv2d_backward(Tensor grad_output, Tensor input, "
      "Tensor offset, Tensor weight, int[2] stride, int[2] padding, "
      "int[2] dilation, Tensor? mask, bool[5] output_mask) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  // Deformable RoI pooling; without offset, average pooling; position-sensitive
  // if group_size is not (1, 1).
  m.def(
      "deform_roi_pool(Tensor input, Tensor boxes, Tensor? offset, "
      "int[2] output_size, int[2] part_size, int[2] group_size, "
      "float spatial_scale, int sampling_ratio, float gamma, str mode) "
      "-> Tensor",
      {at::Tag::pt2_compliant_tag});
  // Gradients of (input, offset), selected by output_mask.
  m.def(
      "_deform_roi_pool_backward(Tensor grad_output, Tensor input, "
      "Tensor boxes, Tensor? offset, int[2] output_size, int[2] part_size, "
      "int[2] group_size, float spatial_scale, int sampling_ratio, "
      "float gamma, str mode, bool[2] output_mask) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}
