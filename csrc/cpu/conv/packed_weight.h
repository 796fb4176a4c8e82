// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// The weight, packed in the order and dtype C in which the GEMMs of the forward
// and backward passes read it, and the K blocking of the forward GEMM.
#pragma once

#include <vector>

#include "ops/deform_conv2d.h"

namespace dcn::cpu {

// Taps [tap, tap + taps) of one slice of channels. They fill columns
// [column, column + taps * slice.size) of the im2col tile of a K block.
struct KSegment {
  ChannelSlice slice;
  int64_t tap;
  int64_t taps;
  int64_t column;
};

// The part of the K dimension that one GEMM multiplies.
struct KBlock {
  std::vector<KSegment> segments;
  int64_t depth; // columns of the im2col tile
  int64_t row; // where the block starts in the packed weight
};

// Splits the K dimension (channels * taps) of the forward GEMM into blocks, so
// that the im2col tile of a block stays in the L2 cache of a core.
struct KBlocking {
  std::vector<ChannelSlice> slices;
  std::vector<int64_t> first_rows; // (slices, taps), rows of the packed weight
  std::vector<std::vector<KBlock>> blocks_of_group;
  int64_t max_depth; // of all blocks
  int64_t rows; // of the packed weight, all groups together

  // Each block starts at a row that is a multiple of `alignment`.
  KBlocking(const DeformConvShape& shape, int64_t alignment);
};

// Output channels of a panel of the forward weight.
constexpr int64_t kPanelOutputs = 32;

// Calls body(begin, end) for the output channels of each panel. The last one
// takes the rest: up to 2 * kPanelOutputs - 1.
template <typename Body>
void for_each_panel(int64_t outputs, const Body& body) {
  for (int64_t begin = 0; begin < outputs;) {
    const bool is_last = outputs - begin < 2 * kPanelOutputs;
    const int64_t end = is_last ? outputs : begin + kPanelOutputs;
    body(begin, end);
    begin = end;
  }
}

// The right operand of im2col tile * weight, in panels of output channels:
// (panels, KBlocking::rows, outputs of the panel).
template <typename S, typename C>
at::Tensor pack_forward_weight(
    const at::Tensor& weight,
    const DeformConvShape& shape,
    const KBlocking& k_blocking);

// The left operand of weight * transposed im2col tile, of groups with a single
// K block: (group_out, KBlocking::rows).
at::Tensor pack_filters(
    const at::Tensor& weight,
    const DeformConvShape& shape,
    const KBlocking& k_blocking);

// The right operand of grad_output * weight: for each slice of channels
// (group_out, taps * slice.size).
template <typename S, typename C>
std::vector<at::Tensor> pack_backward_weight(
    const at::Tensor& weight,
    const DeformConvShape& shape,
    const std::vector<ChannelSlice>& slices);

// Stores a weight gradient, for each slice of channels
// (group_out, taps * slice.size), one after the other, to `weight`.
template <typename T, typename S>
void unpack_weight_gradient(
    const T* packed,
    const DeformConvShape& shape,
    const std::vector<ChannelSlice>& slices,
    const at::Tensor& weight);

} // namespace dcn::cpu
