// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// The bins of a range of RoIs on the maps of some images, of a slice of output
// channels. S is the dtype of the maps, T that of coordinates and sums.
#pragma once

#include "ops/feature_map_view.h"
#include "ops/roi_geometry.h"

namespace dcn::cuda {

// Maps of some images, in which a group of bins has channels of its own.
template <typename S>
struct GroupedMaps {
  FeatureMapView<S> map; // group 0 of image 0; data null: there are none
  int64_t image_stride;
  int64_t group_stride;

  // Channels from `channel` on.
  DCN_INLINE FeatureMapView<S> view(int64_t image, int group, int64_t channel)
      const {
    auto view = map;
    view.data += image * image_stride + group * group_stride +
        channel * map.channel_stride;
    return view;
  }
};

template <typename T>
struct OffsetGrad {
  T y;
  T x;
};

// Samples of an axis that are not skipped.
template <typename T>
DCN_INLINE T count_kept(const BinAxis<T>& bin) {
  T kept = 0;
  for (int64_t i = bin.begin; i < bin.end; ++i) {
    kept += bin_sample(bin, i).kept ? T(1) : T(0);
  }
  return kept;
}

template <typename S, typename T>
struct RoiTile {
  RoiGeometry source;
  int64_t first_roi;
  int64_t rois;
  int64_t first_image; // the maps' image 0
  int64_t images;
  int64_t first_channel; // the maps' channel 0
  int64_t channels;
  GroupedMaps<const S> maps;
  FeatureMapView<S> pooled; // the output, or its gradient; of RoI 0, channel 0
  int64_t pooled_stride; // between RoIs
  // Set by the functions below: threads that share a bin, and whether they
  // access several channels of `pooled` at once.
  int group_size;
  bool pooled_wide;
};

template <typename S, typename T>
struct RoiTileGradients {
  GroupedMaps<T> input; // added to
  OffsetGrad<T>*
      offset_grads; // (rois, classes, bins), added to; null: not wanted
};

// Writes the pooled channels of RoIs on these images; with the first images
// also of RoIs on none.
template <typename S, typename T>
void pool_bins(RoiTile<S, T> tile);

// Adds to the gradients, to that of the input in no fixed order.
template <typename S, typename T>
void backward_bins(RoiTile<S, T> tile, const RoiTileGradients<S, T>& gradients);

// Adds to the gradient of the input alone, each pixel's sum in a fixed order.
template <typename S, typename T>
void backward_input_deterministic(
    RoiTile<S, T> tile,
    const RoiTileGradients<S, T>& gradients);

// The offsets' gradient: for each part the sum of its bins.
template <typename T>
void sum_offset_grads(
    const RoiGeometry& source,
    int64_t first_roi,
    int64_t rois,
    const OffsetGrad<T>* offset_grads,
    const AnyDtypeView& gradient);

} // namespace dcn::cuda
