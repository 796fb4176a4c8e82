// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Deformable im2col and its backward pass (col2im and the gradients of offset
// and mask). S is the dtype of the tensors, T that of coordinates and
// accumulators.
#pragma once

#include "ops/conv_offsets.h"
#include "ops/feature_map_view.h"

namespace dcn::cuda {

// Columns of `positions` output positions of each of `images` images, of one
// slice of channels: (images, positions, taps, channels).
template <typename S, typename T>
struct Im2colTile {
  ConvOffsets offsets;
  int64_t offset_group;
  int64_t image; // in the batch
  int64_t map_image; // the same image in `map` and in the gradients
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
  int group_size; // threads per tap; set by the functions below

  DCN_INLINE int64_t rows() const {
    return images * positions;
  }
  DCN_INLINE int64_t num_taps() const {
    return rows() * offsets.geometry.taps();
  }
};

// What deform_im2col_backward computes.
template <typename T>
struct Im2colGradients {
  FeatureMapView<T>
      input; // of image 0; accumulated; not computed if data is null
  int64_t input_stride; // between images
  ConvOffsetGradients offsets; // of the images of `map`
  bool accumulates_offsets; // adds to those of the previous slices
  bool wants_columns; // overwrites grad_columns with the columns
};

// columns = mask * sampled value.
template <typename S, typename T>
void deform_im2col(Im2colTile<S, T> tile);

// The tile holds the gradient of the columns. Adds to grad_input with atomics,
// in no fixed order.
template <typename S, typename T>
void deform_im2col_backward(
    Im2colTile<S, T> tile,
    const Im2colGradients<T>& gradients);

// Computes gradients.input only, each pixel's sum in a fixed order. `options`
// are those of a tensor on the device.
template <typename S, typename T>
void col2im_deterministic(
    Im2colTile<S, T> tile,
    const Im2colGradients<T>& gradients,
    const at::TensorOptions& options);

} // namespace dcn::cuda
