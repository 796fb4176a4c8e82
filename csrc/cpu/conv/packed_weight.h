// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// The weight in the orders in which products read it, in the dtype C of the
// columns.
#pragma once

#include "cpu/conv/k_blocking.h"

namespace dcn::cpu {

// Chunk after chunk: (depth, group_out), as the right factor of
// columns * weight.
template <typename S, typename C>
at::Tensor pack_forward_weight(
    const at::Tensor& weight,
    const DeformConvShape& shape,
    const KBlocking& chunks);

// For each slice of channels (group_out, taps * slice.size), as the right
// factor of grad_output * weight.
template <typename S, typename C>
std::vector<at::Tensor> pack_backward_weight(
    const at::Tensor& weight,
    const DeformConvShape& shape,
    const std::vector<ChannelSlice>& slices);

} // namespace dcn::cpu
