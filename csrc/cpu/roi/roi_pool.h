// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// RoI pooling on the CPU, and what its two passes share. S is the dtype of the
// feature maps, T that of coordinates and accumulators.
#pragma once

#include <vector>

#include "cpu/channels_last_copy.h"
#include "cpu/roi/bin_kernels.h"
#include "ops/roi_geometry.h"

namespace dcn::cpu {

// Fills `output`.
template <typename S, typename T>
void roi_pool_forward(
    const RoiGeometry& geometry,
    const at::Tensor& input,
    const at::Tensor& output);

// Fills the gradients that are not empty.
template <typename S, typename T>
void roi_pool_backward(
    const RoiGeometry& geometry,
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const RoiPoolGradients& gradients);

// With fewer than kMinVectorChannels channels per class, and offsets for each
// class, vector code over channels does not pay. Each class is then pooled on
// its own from copies of the planes of its channels: see window_kernels.h.
inline bool has_few_channels_per_class(const RoiPoolShape& shape) {
  return shape.classes > 1 && shape.channels_per_class() < kMinVectorChannels;
}

// The bins of each group.
inline std::vector<std::vector<BinIndex>> bins_of_groups(
    const RoiGeometry& geometry) {
  const auto& shape = geometry.shape;
  std::vector<std::vector<BinIndex>> bins(shape.groups.count());
  for (int i = 0; i < shape.bins.h; ++i) {
    for (int j = 0; j < shape.bins.w; ++j) {
      bins[shape.group_of(i, j)].push_back(geometry.bin(i, j));
    }
  }
  return bins;
}

// The boxes of RoIs [first, last), on the feature map.
template <typename T>
class RoiBoxes {
 public:
  RoiBoxes(const RoiGeometry& geometry, int64_t first, int64_t last)
      : first_(first) {
    for (int64_t roi = first; roi < last; ++roi) {
      boxes_.push_back(geometry.roi_box<T>(roi));
    }
  }

  const RoiBox<T>& operator[](int64_t roi) const {
    return boxes_[roi - first_];
  }

  // The RoIs of images [first, first + count).
  std::vector<int64_t> of_images(int64_t first, int64_t count) const {
    std::vector<int64_t> rois;
    for (size_t i = 0; i < boxes_.size(); ++i) {
      const int64_t image = boxes_[i].image;
      if (image >= first && image < first + count) {
        rois.push_back(first_ + static_cast<int64_t>(i));
      }
    }
    return rois;
  }

 private:
  int64_t first_;
  std::vector<RoiBox<T>> boxes_;
};

// Views of the feature maps by image, group of bins and output channel. The
// channels of a group are groups.count() apart in the input.
template <typename S>
class GroupedMaps {
 public:
  GroupedMaps(const RoiPoolShape& shape, const at::Tensor& tensor)
      : view_(feature_map_view<S>(tensor, 0, 0)),
        image_stride_(tensor.stride(0)),
        group_stride_(tensor.stride(1)) {
    view_.channel_stride *= shape.groups.count();
  }

  FeatureMapView<S> operator()(int64_t image, int group, int64_t channel)
      const {
    auto view = view_;
    view.data += image * image_stride_ + group * group_stride_ +
        channel * view_.channel_stride;
    return view;
  }

 private:
  FeatureMapView<S> view_;
  int64_t image_stride_;
  int64_t group_stride_;
};

} // namespace dcn::cpu
