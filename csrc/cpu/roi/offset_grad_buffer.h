// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/roi/roi_pool_vectorized.h"
#include "ops/roi_geometry.h"

namespace dcn {

// The gradients of the offsets before they are summed: of every bin of a chunk
// of RoIs, apart for each slice of output channels, since several tasks write.
template <typename T>
class BinSlopes {
 public:
  BinSlopes(const RoiSource& source, int64_t slice_channels, bool wanted)
      : source_(source),
        shape_(source.shape),
        slice_channels_(slice_channels),
        slices_((shape_.channels + slice_channels - 1) / slice_channels),
        bins_(shape_.classes * shape_.bins.count()) {
    chunk_ = std::clamp<int64_t>(
        kBytes / (slices_ * bins_ * int64_t{sizeof(BinSlope<T>)}),
        1,
        std::max<int64_t>(shape_.rois, 1));
    slopes_.reset(wanted ? new BinSlope<T>[slices_ * chunk_ * bins_] : nullptr);
  }

  int64_t slices() const {
    return slices_;
  }
  // RoIs that are held at once.
  int64_t chunk() const {
    return chunk_;
  }

  // `roi` counts from the first of the chunk.
  BinSlope<T>& at(int64_t slice, int64_t roi, int64_t of_class, int i, int j)
      const {
    const int64_t bin = of_class * shape_.bins.count() + i * shape_.bins.w + j;
    return slopes_[(slice * chunk_ + roi) * bins_ + bin];
  }

  // Stores the gradient of RoIs [first, last), the chunk: for each part the sum
  // of its bins over the slices that have channels of its class, in that order.
  void store(int64_t first, int64_t last, const FloatView& gradient) const {
    const int64_t parts = shape_.parts.count();
    parallel_tasks(last - first, [&](int64_t begin, int64_t end) {
      std::vector<BinSlope<T>> sums(parts);
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

  void sum_bins(int64_t roi, int64_t of_class, std::vector<BinSlope<T>>& sums)
      const {
    const int64_t per_class = shape_.channels_per_class();
    const int64_t from = of_class * per_class / slice_channels_;
    const int64_t to = ((of_class + 1) * per_class - 1) / slice_channels_;
    std::fill(sums.begin(), sums.end(), BinSlope<T>{0, 0});
    for (int64_t slice = from; slice <= to; ++slice) {
      for (int i = 0; i < shape_.bins.h; ++i) {
        for (int j = 0; j < shape_.bins.w; ++j) {
          auto& sum =
              sums[source_.part_y(i) * shape_.parts.w + source_.part_x(j)];
          const auto& slope = at(slice, roi, of_class, i, j);
          sum.y += slope.y;
          sum.x += slope.x;
        }
      }
    }
  }

  const RoiSource& source_;
  const RoiPoolShape& shape_;
  int64_t slice_channels_;
  int64_t slices_;
  int64_t bins_; // of a RoI, all classes
  int64_t chunk_;
  std::unique_ptr<BinSlope<T>[]> slopes_; // (slices, chunk, classes, bins)
};

} // namespace dcn
