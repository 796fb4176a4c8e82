// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "cpu/conv/k_blocking.h"

#include <algorithm>

namespace dcn::cpu {
namespace {

// From 256 to 768 columns a product runs at the processor's peak; deeper ones
// are slower, and so are many small ones.
constexpr int64_t kDepth = 640;

int64_t rounded_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

} // namespace

KBlocking::KBlocking(const DeformConvShape& shape, int64_t alignment)
    : slices(shape.slices(kDepth)),
      blocks_of_group(shape.groups),
      max_depth(0),
      rows(0) {
  const int64_t taps = shape.geometry.taps();
  const int64_t depth = taps * shape.group_in();
  // As many chunks as are needed, of about the same depth.
  const int64_t chunks = std::max<int64_t>((depth + kDepth / 2) / kDepth, 1);
  const int64_t even = (depth + chunks - 1) / chunks;
  int64_t open_group = -1;
  KBlock chunk{};
  const auto close = [&] {
    if (open_group >= 0) {
      rows = rounded_up(rows + chunk.depth, alignment);
      max_depth = std::max(max_depth, chunk.depth);
      blocks_of_group[open_group].push_back(std::move(chunk));
    }
    chunk = {{}, 0, rows};
  };
  for (const auto& slice : slices) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      if (slice.group != open_group ||
          (chunk.depth > 0 && chunk.depth + slice.size / 2 > even)) {
        close();
        open_group = slice.group;
      }
      first_rows.push_back(chunk.row + chunk.depth);
      if (!chunk.segments.empty() &&
          chunk.segments.back().slice.begin == slice.begin) {
        ++chunk.segments.back().taps;
      } else {
        chunk.segments.push_back({slice, tap, 1, chunk.depth});
      }
      chunk.depth += slice.size;
    }
  }
  close();
}

} // namespace dcn::cpu
