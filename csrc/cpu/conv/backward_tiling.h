// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// How the backward pass on the CPU is divided into tasks and blocks.
#pragma once

#include <algorithm>

#include "cpu/conv/grad_output_tile.h"
#include "cpu/conv/sampling_plan.h"
#include "ops/backward_tiling.h"

namespace dcn::cpu {

// Channels of a slice: at most kMaxSliceChannels, and kMinSliceChannels where
// there would be fewer than kSlices slices.
constexpr int64_t kMaxSliceChannels = 64;
constexpr int64_t kMinSliceChannels = 32;
constexpr int64_t kSlices = 8;
constexpr int64_t kMinCopiedChannels = 8;
// Narrower slices of channels-last maps are copied: in place, threads would
// write to the same cache lines.
constexpr int64_t kMinInPlaceChannels = 16;
// Budgets: channels-last copies of one slice of the input and its gradient,
// offset and mask gradients of one task, copies of grad_output, columns of one
// block, and all workspaces together.
constexpr int64_t kCopyBytes = int64_t{8} << 20;
constexpr int64_t kTapBytes = int64_t{2} << 20;
constexpr int64_t kGradOutputBytes = int64_t{24} << 20;
constexpr int64_t kColumnBytes = int64_t{512} << 10;
constexpr int64_t kWorkspaceBytes = int64_t{32} << 20;

inline int64_t round_down(int64_t value, int64_t multiple) {
  return value / multiple * multiple;
}

// How the backward pass is divided into tasks, whatever the number of threads.
struct BackwardTiling {
  ConvChannelTiling channels;
  int64_t tile; // output positions of one task
  int64_t tiles; // per image
  // Whether not exactly one task contributes to the weight gradient of a slice.
  bool sums_weight;
  int64_t block; // output positions of one im2col tile
  int64_t workspace_bytes; // of a task on one thread
  int64_t block_bytes; // of a block, where threads share a task
  int64_t images; // whose tasks run together

  BackwardTiling(
      const BackwardInputs& inputs,
      bool wants_input,
      bool accumulates_in_dtype,
      int64_t element_bytes,
      const GradOutputBytes& grad_output)
      : channels(
            inputs,
            wants_input,
            accumulates_in_dtype,
            accumulates_in_dtype,
            {std::clamp(
                 inputs.shape.in_channels / kSlices,
                 kMinSliceChannels,
                 kMaxSliceChannels),
             kMinCopiedChannels,
             kCopyBytes,
             element_bytes,
             element_bytes,
             kMinInPlaceChannels}) {
    const auto& shape = inputs.shape;
    const int64_t taps = shape.geometry.taps();
    const int64_t positions = shape.geometry.positions();
    const int64_t tap_bytes = 3 * taps * element_bytes;
    const int64_t depth = taps * channels.slice_channels;
    const int64_t max_tile = std::max<int64_t>(
        round_down(
            std::min(
                kTapBytes / tap_bytes,
                kGradOutputBytes / std::max<int64_t>(grad_output.position, 1)),
            4),
        4);
    block = std::min(
        std::clamp<int64_t>(
            round_down(kColumnBytes / (depth * element_bytes), 16), 16, 512),
        max_tile);
    tile = std::min(max_tile, positions);
    tiles = (positions + tile - 1) / tile;
    sums_weight = shape.batch * tiles != 1;
    const int64_t image_bytes = padded_size(tile) * grad_output.position +
        block * grad_output.partial_block;
    images = std::clamp<int64_t>(
        kGradOutputBytes / std::max<int64_t>(image_bytes, 1),
        1,
        std::max<int64_t>(shape.batch, 1));
    block_bytes = 3 * element_bytes * block * depth +
        2 * block * taps * SamplingPlan<double>::kTapBytes;
    workspace_bytes = channels.copy_bytes + tile * tap_bytes +
        element_bytes * shape.group_out() * depth + block_bytes;
  }

  int64_t slices() const {
    return static_cast<int64_t>(channels.slices.size());
  }
};

} // namespace dcn::cpu
