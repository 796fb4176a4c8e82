// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include "ops/deform_conv2d.h"

namespace dcn::cpu {

// Fills `output`. S is the dtype of the tensors, T that of the sums, C that of
// the columns.
template <typename S, typename T, typename C>
void deform_conv2d_forward(
    const DeformConvShape& shape,
    const ForwardInputs& inputs,
    const at::Tensor& output);

} // namespace dcn::cpu
