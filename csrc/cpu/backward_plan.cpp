// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "cpu/backward_plan.h"

#include <algorithm>

namespace dcn {
namespace {

// Channels of a slice, and the fewest that are worth a copy.
constexpr int64_t kWidestSlice = 64;
constexpr int64_t kNarrowestCopy = 8;
// Channels-last copies of one slice, of the input and of its gradient.
constexpr int64_t kCopyBytes = int64_t{8} << 20;
// Tap gradients of one task.
constexpr int64_t kTapBytes = int64_t{2} << 20;
// Columns of one block.
constexpr int64_t kColumnBytes = int64_t{512} << 10;

} // namespace

BackwardPlan::BackwardPlan(
    const BackwardInputs& inputs,
    bool wants_input,
    bool sums_in_dtype,
    int64_t element_bytes)
    : cut(inputs,
          wants_input,
          sums_in_dtype,
          sums_in_dtype,
          {kWidestSlice,
           kNarrowestCopy,
           kCopyBytes,
           element_bytes,
           element_bytes}) {
  const auto& shape = inputs.shape;
  const int64_t taps = shape.geometry.taps();
  const int64_t positions = shape.geometry.positions();
  const int64_t tap_bytes = 3 * taps * element_bytes;
  tile = std::clamp<int64_t>(kTapBytes / tap_bytes, 1, positions);
  tiles = (positions + tile - 1) / tile;
  const int64_t depth = taps * cut.widest;
  block = std::clamp<int64_t>(kColumnBytes / (depth * element_bytes), 16, 512);
  slot_bytes = cut.image_bytes + tile * tap_bytes +
      element_bytes *
          (block * (depth + shape.group_out()) + shape.group_out() * depth) +
      block * taps * int64_t{sizeof(DeformTap<double>)};
}

} // namespace dcn
