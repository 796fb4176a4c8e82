// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include <vector>

#include "ops/deform_conv2d.h"

namespace dcn::cpu {

// Taps [tap, tap + taps) of one slice of channels, in columns
// [column, column + taps * slice.size) of a chunk.
struct KSegment {
  ChannelSlice slice;
  int64_t tap;
  int64_t taps;
  int64_t column;
};

// Columns that are gathered and multiplied at once.
struct KBlock {
  std::vector<KSegment> segments;
  int64_t depth;
  int64_t row; // its first row in the weight, where all chunks lie in order
};

// How the columns of one block of positions are cut along channels and taps, so
// that a block stays in a core's own cache.
struct KBlocking {
  std::vector<ChannelSlice> slices;
  std::vector<int64_t> first_rows; // (slices, taps): the weight's row
  std::vector<std::vector<KBlock>> blocks_of_group;
  int64_t max_depth;
  int64_t rows; // of the weight, all groups together

  // Each chunk starts at a row that is a multiple of `alignment`.
  KBlocking(const DeformConvShape& shape, int64_t alignment);
};

} // namespace dcn::cpu
