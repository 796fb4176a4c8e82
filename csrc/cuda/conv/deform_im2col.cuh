// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Columns of a chunk of output positions, and what the gradient of columns is
// turned into. S is the dtype of the tensors, T that of coordinates and sums.
#pragma once

#include "ops/conv_offsets.h"
#include "ops/feature_map_view.h"

namespace dcn::cuda {

// Rows of a chunk: `positions` positions of each of `images` images, of one
// slice of channels. A row holds taps, a tap channels.
template <typename S, typename T>
struct Im2colTile {
  ConvOffsets taps;
  int64_t offset_group;
  int64_t image; // in the batch
  int64_t map_image; // the same image in `map` and `grad_input`
  int64_t images;
  int first_y; // of the first position
  int first_x;
  int64_t positions;
  int64_t channels;
  FeatureMapView<const S> map; // of image 0
  int64_t map_stride; // between images
  S* columns;
  int64_t row_stride;
  int64_t tap_stride;
  int group_size; // threads that share a tap; set by the functions below

  DCN_INLINE int64_t rows() const {
    return images * positions;
  }
  DCN_INLINE int64_t num_taps() const {
    return rows() * taps.geometry.taps();
  }
};

// Where gradients go.
template <typename T>
struct Im2colGradients {
  FeatureMapView<T> input; // of image 0, added to; data null: not wanted
  int64_t input_stride; // between images
  ConvOffsetGradients taps;
  bool adds_taps; // to those of the slices before
  bool wants_columns; // replaces the gradients by the columns themselves
};

// columns = mask * sampled value.
template <typename S, typename T>
void deform_im2col(Im2colTile<S, T> tile);

// Reads the gradient of the columns from chunk.columns; visits each tap once,
// and adds to grad_input in no fixed order.
template <typename S, typename T>
void deform_im2col_backward(
    Im2colTile<S, T> tile,
    const Im2colGradients<T>& gradients);

// Adds the same to gradients.input alone, each pixel's sum in a fixed order.
template <typename S, typename T>
void col2im_deterministic(
    Im2colTile<S, T> tile,
    const Im2colGradients<T>& gradients);

} // namespace dcn::cuda
