// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Columns of a block of output positions: for each position and tap the sampled
// channels, contiguous, so that a tap is decoded once and its sum is vector
// code.
#pragma once

#include "ops/conv_offsets.h"
#include "ops/feature_map_view.h"

namespace dcn::cpu {

// Where the taps of output positions [begin, end) lie: taps[position][tap].
template <typename T>
void compute_taps(
    const ConvOffsets& source,
    int64_t image,
    int64_t offset_group,
    int64_t begin,
    int64_t end,
    DeformTap<T>* taps);

// The columns of some taps of some positions: those of a position follow each
// other, tap after tap.
template <typename C>
struct Im2colTile {
  C* data;
  int64_t positions;
  int64_t taps;
  int64_t channels;
  int64_t stride; // from position to position
};

// columns = mask * sampled value. The taps of a position begin `tap_stride`
// after those of the one before.
template <typename S, typename T, typename C>
void deform_im2col(
    const FeatureMapView<const S>& map,
    const DeformTap<T>* taps,
    int64_t tap_stride,
    const Im2colTile<C>& columns);

// What the gradient of the columns is turned into.
template <typename T>
struct Im2colGradients {
  FeatureMapView<T> input; // adds to it; data null: not wanted
  T* taps; // writes (dy, dx, mask) per row; null: not wanted
  bool wants_columns; // replaces the gradients by the columns themselves
};

// Reads the gradient of the columns of all taps from `columns` and visits each
// tap once.
template <typename S, typename T>
void deform_im2col_backward(
    const FeatureMapView<const S>& map,
    const DeformTap<T>* taps,
    const Im2colTile<T>& columns,
    const Im2colGradients<T>& gradients);

} // namespace dcn::cpu
