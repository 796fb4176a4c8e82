// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Deformable im2col and its backward pass (col2im and the gradients of offset
// and mask), for a tile of output positions and a slice of channels. The
// channels of a tap are contiguous, so that the bilinear weights of a tap are
// computed once and the sum over its four corners is vector code.
#pragma once

#include "ops/conv_offsets.h"
#include "ops/feature_map_view.h"

namespace dcn::cpu {

// Computes sampling locations and bilinear weights of all taps of output
// positions [begin, end): taps[position][tap].
template <typename T>
void compute_taps(
    const ConvOffsets& source,
    int64_t image,
    int64_t offset_group,
    int64_t begin,
    int64_t end,
    DeformTap<T>* taps);

// Columns of some taps of some positions, (positions, taps, channels).
template <typename C>
struct Im2colTile {
  C* data;
  int64_t positions;
  int64_t taps;
  int64_t channels;
  int64_t stride; // from position to position
};

// columns = mask * sampled value. `tap_stride` is the distance in `taps` from
// one position to the next.
template <typename S, typename T, typename C>
void deform_im2col(
    const FeatureMapView<const S>& map,
    const DeformTap<T>* taps,
    int64_t tap_stride,
    const Im2colTile<C>& columns);

// What deform_im2col_backward computes.
template <typename T>
struct Im2colGradients {
  FeatureMapView<T> input; // accumulated; not computed if data is null
  T* taps; // (positions, taps, 3): dy, dx, mask; not computed if null
  bool wants_columns; // overwrites grad_columns with the columns
};

// The tile holds the gradient of the columns, of all taps. Visits each tap
// once.
template <typename S, typename T>
void deform_im2col_backward(
    const FeatureMapView<const S>& map,
    const DeformTap<T>* taps,
    const Im2colTile<T>& columns,
    const Im2colGradients<T>& gradients);

} // namespace dcn::cpu
