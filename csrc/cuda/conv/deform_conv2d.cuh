// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// The two passes of deformable convolution on CUDA.

#pragma once

#include "ops/deform_conv2d.h"

namespace dcn::cuda {

// Fills `output`.
void deform_conv2d_forward(
    const DeformConvShape& shape,
    const ForwardInputs& inputs,
    const at::Tensor& output);

// Fills the gradients that are not empty.
void deform_conv2d_backward(
    const BackwardInputs& inputs,
    const at::Tensor& weight,
    const DeformConvGradients& gradients);

} // namespace dcn::cuda
