// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include <vector>

#include "ops/deform_conv2d.h"

namespace dcn {

// Taps [tap, tap + taps) of one slice of channels, in columns
// [column, column + taps * slice.size) of a chunk.
struct ColumnPiece {
  ChannelSlice slice;
  int64_t tap;
  int64_t taps;
  int64_t column;
};

// Columns that are gathered and multiplied at once.
struct ColumnChunk {
  std::vector<ColumnPiece> pieces;
  int64_t depth;
  int64_t row; // its first row in the weight, where all chunks lie in order
};

// How the columns of one block of positions are cut along channels and taps, so
// that a block stays in a core's own cache.
struct ColumnChunks {
  std::vector<ChannelSlice> slices;
  std::vector<int64_t> first_rows; // (slices, taps): the weight's row
  std::vector<std::vector<ColumnChunk>> of_group;
  int64_t deepest;
  int64_t rows; // of the weight, all groups together

  // Each chunk starts at a row that is a multiple of `alignment`.
  ColumnChunks(const DeformConvShape& shape, int64_t alignment);
};

} // namespace dcn
