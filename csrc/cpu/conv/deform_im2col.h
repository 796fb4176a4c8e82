// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Deformable im2col and its backward pass (col2im and the gradients of offset
// and mask), for a tile of output positions and a slice of channels. The
// channels of a tap are contiguous, so that the sum over its four corners is
// vector code.
#pragma once

#include "cpu/conv/sampling_plan.h"
#include "ops/conv_offsets.h"
#include "ops/feature_map_view.h"

namespace dcn::cpu {

// Columns of some taps of some positions, (positions, taps, channels).
template <typename C>
struct Im2colTile {
  C* data;
  int64_t positions;
  int64_t taps;
  int64_t channels;
  int64_t stride; // from position to position
};

// columns = mask * sampled value, of the taps from `first_tap` on.
template <typename S, typename T, typename C>
void deform_im2col(
    const FeatureMapView<const S>& map,
    const SamplingPlan<T>& plan,
    int64_t first_tap,
    const Im2colTile<C>& columns);

// What deform_im2col_backward computes.
template <typename T>
struct Im2colGradients {
  FeatureMapView<T> input; // accumulated; not computed if data is null
  // The pixels of `input`; another plan than that of the map if the strides
  // differ.
  const SamplingPlan<T>* plan;
  bool wants_taps; // the plan's corner_sums()
  // The columns, laid out like the tile, whose memory this may be; not computed
  // if null.
  T* columns;
};

// The tile holds the gradient of the columns, of all taps. Visits each tap
// once.
template <typename S, typename T>
void deform_im2col_backward(
    const FeatureMapView<const S>& map,
    const SamplingPlan<T>& plan,
    const Im2colTile<T>& columns,
    const Im2colGradients<T>& gradients);

// Only the gradient of the input, of channels [begin, end) of the tile:
// several threads share the channels of a slice. The same bits as
// deform_im2col_backward.
template <typename T>
void deform_col2im(
    const SamplingPlan<T>& plan,
    const Im2colTile<T>& columns,
    int64_t begin,
    int64_t end,
    const FeatureMapView<T>& input);

} // namespace dcn::cpu
