// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "cpu/conv/backward_plan.h"

#include <algorithm>

namespace dcn::cpu {
namespace {

// Channels of a slice: at most, at least where that makes too few slices to
// keep the threads busy, and the fewest that are worth a copy.
constexpr int64_t kWidestSlice = 64;
constexpr int64_t kNarrowestSlice = 32;
constexpr int64_t kSlices = 8;
constexpr int64_t kNarrowestCopy = 8;
// Channels-last copies of one slice, of the input and of its gradient.
constexpr int64_t kCopyBytes = int64_t{8} << 20;
// Tap gradients of one task.
constexpr int64_t kTapBytes = int64_t{2} << 20;
// Copies of grad_output.
constexpr int64_t kGradBytes = int64_t{16} << 20;
// Columns of one block.
constexpr int64_t kColumnBytes = int64_t{512} << 10;

int64_t rounded_down(int64_t value, int64_t multiple) {
  return value / multiple * multiple;
}

} // namespace

BackwardTiling::BackwardTiling(
    const BackwardInputs& inputs,
    bool wants_input,
    bool sums_in_dtype,
    int64_t element_bytes,
    int64_t grad_bytes)
    : channels(
          inputs,
          wants_input,
          sums_in_dtype,
          sums_in_dtype,
          {std::clamp(
               inputs.shape.in_channels / kSlices,
               kNarrowestSlice,
               kWidestSlice),
           kNarrowestCopy,
           kCopyBytes,
           element_bytes,
           element_bytes}) {
  const auto& shape = inputs.shape;
  const int64_t taps = shape.geometry.taps();
  const int64_t positions = shape.geometry.positions();
  const int64_t tap_bytes = 3 * taps * element_bytes;
  const int64_t most = std::min(
      kTapBytes / tap_bytes, kGradBytes / std::max<int64_t>(grad_bytes, 1));
  // Even, for products that take two positions at a time.
  tile = std::min(std::max<int64_t>(rounded_down(most, 2), 2), positions);
  tiles = (positions + tile - 1) / tile;
  images = std::clamp<int64_t>(
      kGradBytes / std::max<int64_t>(tile * grad_bytes, 1),
      1,
      std::max<int64_t>(shape.batch, 1));
  const int64_t depth = taps * channels.widest;
  block = std::clamp<int64_t>(
      rounded_down(kColumnBytes / (depth * element_bytes), 16), 16, 512);
  workspace_bytes = channels.image_bytes + tile * tap_bytes +
      element_bytes * (2 * block * depth + shape.group_out() * depth) +
      block * taps * int64_t{sizeof(DeformTap<double>)};
}

} // namespace dcn::cpu
