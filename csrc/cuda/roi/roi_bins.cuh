// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Kernels of RoI pooling, for the bins of a range of RoIs, a range of images
// and a slice of output channels. S is the dtype of the feature maps, T that of
// coordinates and accumulators.
#pragma once

#include "ops/feature_map_view.h"
#include "ops/roi_geometry.h"

namespace dcn::cuda {

// Feature maps of some images. Each group of bins has separate channels.
template <typename S>
struct GroupedMaps {
  FeatureMapView<S> map; // of group 0 and image 0; data may be null
  int64_t image_stride;
  int64_t group_stride;

  // View of the channels from `channel` on.
  DCN_INLINE FeatureMapView<S> view(int64_t image, int group, int64_t channel)
      const {
    auto view = map;
    view.data += image * image_stride + group * group_stride +
        channel * map.channel_stride;
    return view;
  }
};

// Gradient of the position of a bin along y and x.
template <typename T>
struct OffsetGrad {
  T y;
  T x;
};

// Counts the samples of an axis that are not skipped.
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
  RoiGeometry geometry;
  int64_t first_roi;
  int64_t rois;
  int64_t first_image; // image 0 of `maps`
  int64_t images;
  int64_t first_channel; // channel 0 of `maps`
  int64_t channels;
  GroupedMaps<const S> maps;
  FeatureMapView<S> pooled; // output or grad_output, of RoI 0 and channel 0
  int64_t pooled_stride; // between RoIs
  // Set by the functions below: threads per bin, and whether they access
  // several channels of `pooled` at once.
  int group_size;
  bool vectorized_pooled;
};

template <typename S, typename T>
struct RoiTileGradients {
  GroupedMaps<T> input; // accumulated; not computed if data is null
  // (rois, classes, bins); accumulated; not computed if null
  OffsetGrad<T>* offset_grads;
};

// Pools the RoIs of these images. With image 0 also RoIs whose batch index is
// invalid.
template <typename S, typename T>
void pool_bins(RoiTile<S, T> tile);

// Adds to the gradients; to that of the input with atomics, in no fixed order.
template <typename S, typename T>
void backward_bins(RoiTile<S, T> tile, const RoiTileGradients<S, T>& gradients);

// Computes the gradient of the input only, each pixel's sum in a fixed order.
// `options` are those of a tensor on the device.
template <typename S, typename T>
void backward_input_deterministic(
    RoiTile<S, T> tile,
    const RoiTileGradients<S, T>& gradients,
    const at::TensorOptions& options);

// Writes the gradient of the offset tensor: for each part the sum of its bins,
// in a fixed order.
template <typename T>
void sum_offset_grads(
    const RoiGeometry& geometry,
    int64_t first_roi,
    int64_t rois,
    const OffsetGrad<T>* offset_grads,
    const AnyDtypeView& gradient);

} // namespace dcn::cuda
