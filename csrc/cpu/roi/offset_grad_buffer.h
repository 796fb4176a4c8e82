// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/roi/roi_pool.h"

namespace dcn::cpu {

// The offset gradients of every bin of a range of RoIs, before they are summed:
// one for each slice of output channels that contains channels of the class, so
// that no two tasks write to the same.
template <typename T>
class OffsetGradBuffer {
 public:
  static constexpr int64_t kBytes = int64_t{12} << 20;

  OffsetGradBuffer(
      const RoiGeometry& geometry,
      int64_t slice_channels,
      bool wanted)
      : shape_(geometry.shape),
        slice_channels_(slice_channels),
        slices_((shape_.channels + slice_channels - 1) / slice_channels),
        bins_(shape_.classes * shape_.bins.count()) {
    for (int64_t k = 0; k < shape_.classes; ++k) {
      slices_of_class_ =
          std::max(slices_of_class_, last_slice(k) - first_slice(k) + 1);
    }
    for (int i = 0; i < shape_.bins.h; ++i) {
      for (int j = 0; j < shape_.bins.w; ++j) {
        part_of_bin_.push_back(
            geometry.part_y(i) * shape_.parts.w + geometry.part_x(j));
      }
    }
    max_rois_ = std::clamp<int64_t>(
        kBytes / (slices_of_class_ * bins_ * int64_t{sizeof(OffsetGrad<T>)}),
        1,
        std::max<int64_t>(shape_.rois, 1));
    offset_grads_.reset(
        wanted ? new OffsetGrad<T>[slices_of_class_ * max_rois_ * bins_]
               : nullptr);
  }

  int64_t slices() const {
    return slices_;
  }
  // Capacity in RoIs.
  int64_t max_rois() const {
    return max_rois_;
  }

  // The index of a slice among those that contain channels of the class.
  int64_t slice_of_class(int64_t slice, int64_t class_index) const {
    return slice - first_slice(class_index);
  }

  // `roi` counts from the first one in the buffer.
  OffsetGrad<T>& at(
      int64_t slice_of_class,
      int64_t roi,
      int64_t class_index,
      int i,
      int j) const {
    const int64_t bin =
        class_index * shape_.bins.count() + i * shape_.bins.w + j;
    return offset_grads_[(slice_of_class * max_rois_ + roi) * bins_ + bin];
  }

  // Writes the gradient of the buffered RoIs [first, last): for each part the
  // sum of its bins over the slices that contain channels of the class.
  void store(int64_t first, int64_t last, const AnyDtypeView& gradient) const {
    const int64_t parts = shape_.parts.count();
    parallel_tasks(last - first, [&](int64_t begin, int64_t end) {
      std::vector<OffsetGrad<T>> sums(parts);
      for (int64_t roi = begin; roi < end; ++roi) {
        for (int64_t k = 0; k < shape_.classes; ++k) {
          sum_bins(roi, k, sums);
          const OffsetGrad<T>* sum = sums.data();
          for (int y = 0; y < shape_.parts.h; ++y) {
            for (int x = 0; x < shape_.parts.w; ++x, ++sum) {
              const int64_t to = first + roi;
              gradient.store(gradient.at(to, 2 * k, y, x), sum->x);
              gradient.store(gradient.at(to, 2 * k + 1, y, x), sum->y);
            }
          }
        }
      }
    });
  }

 private:
  int64_t first_slice(int64_t class_index) const {
    return class_index * shape_.channels_per_class() / slice_channels_;
  }
  int64_t last_slice(int64_t class_index) const {
    const int64_t stop = (class_index + 1) * shape_.channels_per_class();
    return (stop - 1) / slice_channels_;
  }

  void sum_bins(
      int64_t roi,
      int64_t class_index,
      std::vector<OffsetGrad<T>>& sums) const {
    std::fill(sums.begin(), sums.end(), OffsetGrad<T>{0, 0});
    const int64_t slices = last_slice(class_index) - first_slice(class_index);
    for (int64_t slice = 0; slice <= slices; ++slice) {
      const OffsetGrad<T>* grad = &at(slice, roi, class_index, 0, 0);
      for (const int part : part_of_bin_) {
        sums[part].y += grad->y;
        sums[part].x += grad->x;
        ++grad;
      }
    }
  }

  const RoiPoolShape& shape_;
  int64_t slice_channels_;
  int64_t slices_;
  int64_t slices_of_class_ = 1; // at most
  int64_t bins_; // of a RoI, all classes
  int64_t max_rois_;
  std::vector<int> part_of_bin_;
  std::unique_ptr<OffsetGrad<T>[]>
      offset_grads_; // (slices_of_class, max_rois, classes, bins)
};

} // namespace dcn::cpu
