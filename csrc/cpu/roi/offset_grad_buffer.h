// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/roi/roi_pool_vectorized.h"
#include "ops/roi_geometry.h"

namespace dcn::cpu {

// The gradients of the offsets before they are summed: of every bin of a chunk
// of RoIs, apart for each slice of output channels, since several tasks write.
template <typename T>
class OffsetGradBuffer {
 public:
  OffsetGradBuffer(
      const RoiGeometry& source,
      int64_t slice_channels,
      bool wanted)
      : source_(source),
        shape_(source.shape),
        slice_channels_(slice_channels),
        slices_((shape_.channels + slice_channels - 1) / slice_channels),
        bins_(shape_.classes * shape_.bins.count()) {
    max_rois_ = std::clamp<int64_t>(
        kBytes / (slices_ * bins_ * int64_t{sizeof(OffsetGrad<T>)}),
        1,
        std::max<int64_t>(shape_.rois, 1));
    offset_grads_.reset(
        wanted ? new OffsetGrad<T>[slices_ * max_rois_ * bins_] : nullptr);
  }

  int64_t slices() const {
    return slices_;
  }
  // RoIs that are held at once.
  int64_t max_rois() const {
    return max_rois_;
  }

  // `roi` counts from the first of the chunk.
  OffsetGrad<T>& at(
      int64_t slice,
      int64_t roi,
      int64_t class_index,
      int i,
      int j) const {
    const int64_t bin =
        class_index * shape_.bins.count() + i * shape_.bins.w + j;
    return offset_grads_[(slice * max_rois_ + roi) * bins_ + bin];
  }

  // Stores the gradient of RoIs [first, last), the chunk: for each part the sum
  // of its bins over the slices that have channels of its class, in that order.
  void store(int64_t first, int64_t last, const AnyDtypeView& gradient) const {
    const int64_t parts = shape_.parts.count();
    parallel_tasks(last - first, [&](int64_t begin, int64_t end) {
      std::vector<OffsetGrad<T>> sums(parts);
      for (int64_t roi = begin; roi < end; ++roi) {
        for (int64_t k = 0; k < shape_.classes; ++k) {
          sum_bins(roi, k, sums);
          for (int64_t part = 0; part < parts; ++part) {
            const int64_t y = part / shape_.parts.w, x = part % shape_.parts.w;
            const int64_t to = first + roi;
            gradient.store(gradient.at(to, 2 * k, y, x), sums[part].x);
            gradient.store(gradient.at(to, 2 * k + 1, y, x), sums[part].y);
          }
        }
      }
    });
  }

 private:
  static constexpr int64_t kBytes = int64_t{12} << 20;

  void sum_bins(
      int64_t roi,
      int64_t class_index,
      std::vector<OffsetGrad<T>>& sums) const {
    const int64_t per_class = shape_.channels_per_class();
    const int64_t from = class_index * per_class / slice_channels_;
    const int64_t to = ((class_index + 1) * per_class - 1) / slice_channels_;
    std::fill(sums.begin(), sums.end(), OffsetGrad<T>{0, 0});
    for (int64_t slice = from; slice <= to; ++slice) {
      for (int i = 0; i < shape_.bins.h; ++i) {
        for (int j = 0; j < shape_.bins.w; ++j) {
          auto& sum =
              sums[source_.part_y(i) * shape_.parts.w + source_.part_x(j)];
          const auto& dweight = at(slice, roi, class_index, i, j);
          sum.y += dweight.y;
          sum.x += dweight.x;
        }
      }
    }
  }

  const RoiGeometry& source_;
  const RoiPoolShape& shape_;
  int64_t slice_channels_;
  int64_t slices_;
  int64_t bins_; // of a RoI, all classes
  int64_t max_rois_;
  std::unique_ptr<OffsetGrad<T>[]>
      offset_grads_; // (slices, chunk, classes, bins)
};

} // namespace dcn::cpu
