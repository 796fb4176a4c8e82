// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Pools the bins of few channels from planes: the same bin of a batch of RoIs
// at a time, whose samples are computed with vector code along RoIs. Rows of
// pixels are read with vector code along columns: the weights of all samples of
// a bin along x are summed for each pixel of a window of kWindow columns.
#pragma once

#include <vector>

#include "cpu/roi/roi_pool.h"
#include "ops/feature_map_view.h"
#include "ops/roi_geometry.h"

namespace dcn::cpu {

constexpr int kWindow = 8;
constexpr int kBatchSize = 16;
// RoIs with more samples along an axis of a bin are not batched. Nor are bins
// whose samples along x need more than a window.
constexpr int kMaxSamples = 8;

// Planes with a margin at the right, so that windows may begin at any pixel.
// The margin has no weight, but must be finite.
inline int64_t window_planes_size(Size2d map, int64_t channels) {
  return channels * map.h * (map.w + kWindow);
}

template <typename T>
FeatureMapView<T> window_planes_view(T* data, Size2d map) {
  return {data, window_planes_size(map, 1), map.w + kWindow, 1};
}

// Any view, for reading only.
template <typename T>
FeatureMapView<const T> const_view(const FeatureMapView<T>& view) {
  return {view.data, view.channel_stride, view.row_stride, view.column_stride};
}

// Only from finite planes may windows be read: they contain pixels without
// weight.
template <typename T>
bool are_finite(const T* values, int64_t count);

// Copies planes to window planes, or adds window planes to planes.
template <typename From, typename To, bool kAdd = false>
void copy_planes(
    const FeatureMapView<From>& from,
    const FeatureMapView<To>& to,
    int64_t channels,
    Size2d size) {
  const bool contiguous = from.column_stride == 1 && to.column_stride == 1;
  const auto copy = [](const From& source, To& target) {
    const auto value = static_cast<OpMathType<To>>(source);
    target = static_cast<To>(kAdd ? target + value : value);
  };
  for (int64_t c = 0; c < channels; ++c) {
    for (int y = 0; y < size.h; ++y) {
      const From* source = from.pixel(y, 0) + c * from.channel_stride;
      To* target = to.pixel(y, 0) + c * to.channel_stride;
      for (int x = 0; contiguous && x < size.w; ++x) { // for vectorization
        copy(source[x], target[x]);
      }
      for (int x = 0; !contiguous && x < size.w; ++x) {
        copy(source[x * from.column_stride], target[x * to.column_stride]);
      }
    }
  }
}

// The bins of several RoIs along one axis, without offsets.
template <typename T>
struct RoiBinsAxis {
  int extent; // of the map
  std::vector<T> first_position, step, count; // (bins, rois)
  std::vector<T> offset_scale; // (rois): d position / d offset
};

// The RoIs of one image whose bins may be batched, and the others.
template <typename T>
struct BatchedRois {
  std::vector<int64_t> rois;
  std::vector<int64_t> others;
  RoiBinsAxis<T> y, x;

  BatchedRois(
      const RoiPoolShape& shape,
      const RoiBoxes<T>& boxes,
      const std::vector<int64_t>& rois_of_image);
};

// Samples of a batch of bins along one axis.
template <typename T>
struct BinBatchAxis {
  T offset[kBatchSize];
  T offset_scale[kBatchSize];
  T count[kBatchSize]; // samples
  T kept[kBatchSize]; // samples that are not skipped
  int begin[kBatchSize]; // of the pixels of all samples that are not skipped
  int end[kBatchSize];
  int pixel[2][kMaxSamples][kBatchSize];
  T weight[2][kMaxSamples][kBatchSize]; // 0 for skipped samples
  T dweight[2][kMaxSamples][kBatchSize];
};

// The same bin of the same class of a batch of RoIs.
template <typename T>
struct BinBatch {
  const int64_t* rois;
  int size;
  BinBatchAxis<T> y, x;
  T divisor[kBatchSize]; // 0 if all samples are skipped
  bool fits[kBatchSize]; // whether the bin fits a window, and no offset is NaN

  // Of located.rois[first] and those after it.
  void locate(
      const RoiGeometry& geometry,
      const BatchedRois<T>& located,
      int64_t first,
      int64_t class_index,
      const BinIndex& index);

 private:
  void compute_samples(
      RoiMode mode,
      const BatchedRois<T>& located,
      int64_t first,
      const BinIndex& index);
};

// sums[item] = what the bin pools from the plane, if it fits.
template <typename T>
void pool_batch(
    const FeatureMapView<const T>& map,
    const BinBatch<T>& batch,
    T* sums);

// Gradients of the offsets of a batch of bins.
template <typename T>
struct BatchOffsetGrad {
  T y[kBatchSize];
  T x[kBatchSize];
};

// For the bins that fit, adds gradient[item] times the pixels' weights to
// `input`, unless its data is null, and to `offset_grad`, if wants_offset.
template <typename T>
void backward_batch(
    const FeatureMapView<const T>& map,
    const BinBatch<T>& batch,
    const T* gradient,
    bool wants_offset,
    const FeatureMapView<T>& input,
    BatchOffsetGrad<T>& offset_grad);

} // namespace dcn::cpu
