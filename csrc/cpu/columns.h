// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Columns of a block of output positions: for each position and tap the sampled
// channels, contiguous, so that a tap is decoded once and its sum is vector
// code.
#pragma once

#include "ops/map_view.h"
#include "ops/tap_source.h"

namespace dcn {

// Where the taps of output positions [begin, end) lie: taps[position][tap].
template <typename T>
void locate_taps(
    const TapSource& source,
    int64_t image,
    int64_t offset_group,
    int64_t begin,
    int64_t end,
    DeformTap<T>* taps);

// Rows of columns: row r belongs to taps[r], starts at
// data + (r / taps_per_position) * position_stride
//      + (r % taps_per_position) * tap_stride.
template <typename T>
struct Columns {
  T* data;
  int64_t positions;
  int64_t taps_per_position;
  int64_t position_stride;
  int64_t tap_stride;
  int64_t channels;

  DCN_INLINE T* row(int64_t position, int64_t tap) const {
    return data + position * position_stride + tap * tap_stride;
  }
};

// columns = mask * sampled value.
template <typename S, typename T>
void gather_columns(
    const MapView<const S>& map,
    const DeformTap<T>* taps,
    const Columns<T>& columns);

// What the gradient of the columns is turned into.
template <typename T>
struct ColumnGradients {
  MapView<T> input; // adds to it; data null: not wanted
  T* taps; // writes (dy, dx, mask) per row; null: not wanted
  bool wants_columns; // replaces the gradients by the columns themselves
};

// Reads the gradient of the columns from `columns` and visits each tap once.
template <typename S, typename T>
void backward_columns(
    const MapView<const S>& map,
    const DeformTap<T>* taps,
    const Columns<T>& columns,
    const ColumnGradients<T>& gradients);

} // namespace dcn
