// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// The two passes of deformable convolution on the CPU. S is the dtype of the
// tensors, T that of coordinates and accumulators, C that of the GEMM operands.
#pragma once

#include "ops/deform_conv2d.h"

namespace dcn::cpu {

// Fills `output`.
template <typename S, typename T, typename C>
void deform_conv2d_forward(
    const DeformConvShape& shape,
    const ForwardInputs& inputs,
    const at::Tensor& output);

// Fills the gradients of input, offset, mask and weight that are not empty.
template <typename S, typename T, typename C>
void deform_conv2d_backward(
    const BackwardInputs& inputs,
    const at::Tensor& weight,
    const DeformConvGradients& gradients);

} // namespace dcn::cpu
