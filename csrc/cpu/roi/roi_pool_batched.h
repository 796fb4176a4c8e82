// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Bins of many RoIs side by side: the same bin of the same class of each, so
// that one plane is read. Where their samples lie is worked out in vector code
// over the RoIs; what they read is too scattered for that.
#pragma once

#include <vector>

#include "cpu/roi/roi_pool_vectorized.h"
#include "ops/roi_geometry.h"

namespace dcn::cpu {

constexpr int kBatchSize = 16;
// Bins with more samples along an axis do not fit.
constexpr int kMaxSamples = 8;

// Samples of the bins along one axis.
template <typename T>
struct BinBatchAxis {
  T first[kBatchSize]; // position
  T step[kBatchSize];
  T count[kBatchSize];
  T kept[kBatchSize]; // samples
  int at[2][kMaxSamples][kBatchSize];
  T weight[2][kMaxSamples][kBatchSize];
  T dweight[2][kMaxSamples][kBatchSize];

  void put(int item, const BinAxis<T>& bin) {
    first[item] = bin.first_position;
    step[item] = bin.step;
    count[item] = bin.count;
  }
  // Finds the samples; those that are skipped weigh nothing.
  void compute_samples(RoiMode mode, int extent, int batch);

  BinSample<T> sample(int64_t i, int item) const {
    BinSample<T> sample;
    sample.kept = true; // as good as: it would weigh nothing
    for (int k = 0; k < 2; ++k) {
      sample.tap.at[k] = at[k][i][item];
      sample.tap.weight[k] = weight[k][i][item];
      sample.tap.dweight[k] = dweight[k][i][item];
    }
    return sample;
  }
};

template <typename T>
struct BinBatch {
  int size = 0;
  int64_t roi[kBatchSize];
  int64_t image[kBatchSize];
  T offset_scale_y[kBatchSize];
  T offset_scale_x[kBatchSize];
  BinBatchAxis<T> y, x;

  bool full() const {
    return size == kBatchSize;
  }
  // Whether it was taken.
  bool try_add(int64_t of_roi, const RoiBin<T>& located) {
    if (located.state != RoiState::kInside ||
        !(located.y.count <= T(kMaxSamples)) ||
        !(located.x.count <= T(kMaxSamples))) {
      return false;
    }
    roi[size] = of_roi;
    image[size] = located.image;
    offset_scale_y[size] = located.offset_scale_y;
    offset_scale_x[size] = located.offset_scale_x;
    y.put(size, located.y);
    x.put(size, located.x);
    ++size;
    return true;
  }
  void compute_samples(const RoiPoolShape& shape) {
    y.compute_samples(shape.mode, shape.map.h, size);
    x.compute_samples(shape.mode, shape.map.w, size);
  }
  T divisor(RoiMode mode, int item) const {
    return bin_divisor(
        mode, y.count[item], x.count[item], y.kept[item], x.kept[item]);
  }
};

// Whether no pixel is infinite or NaN: only then may pixels without weight be
// read, as the two functions below do.
template <typename S>
bool is_finite(
    const FeatureMapView<const S>& map,
    int64_t channels,
    int height,
    int width);

// The same of the maps of several images, each looked at when it is asked for.
template <typename S>
class FiniteMapCache {
 public:
  FiniteMapCache(
      int64_t first_image,
      int64_t images,
      Size2d map,
      int64_t channels)
      : first_(first_image), known_(images), map_(map), channels_(channels) {}

  bool operator()(int64_t image, const FeatureMapView<const S>& view) {
    auto& known = known_[image - first_];
    if (known == Known::kNo) {
      known = is_finite(view, channels_, map_.h, map_.w) ? Known::kFinite
                                                         : Known::kInfinite;
    }
    return known == Known::kFinite;
  }

 private:
  enum class Known : char { kNo, kFinite, kInfinite };
  int64_t first_;
  std::vector<Known> known_;
  Size2d map_;
  int64_t channels_;
};

// Weighted sum over the pixels of one bin, of the first channel.
template <typename S, typename T>
T pool_batched(
    const FeatureMapView<const S>& map,
    const BinBatch<T>& bins,
    int item) {
  T sum = 0;
  const auto& y = bins.y;
  const auto& x = bins.x;
  for (int i = 0; i < static_cast<int>(y.count[item]); ++i) {
    const S* row0 = map.pixel(y.at[0][i][item], 0);
    const S* row1 = map.pixel(y.at[1][i][item], 0);
    T upper = 0, lower = 0;
    for (int j = 0; j < static_cast<int>(x.count[item]); ++j) {
      const int64_t x0 = x.at[0][j][item] * map.column_stride;
      const int64_t x1 = x.at[1][j][item] * map.column_stride;
      const T w0 = x.weight[0][j][item], w1 = x.weight[1][j][item];
      upper += w0 * static_cast<T>(row0[x0]) + w1 * static_cast<T>(row0[x1]);
      lower += w0 * static_cast<T>(row1[x0]) + w1 * static_cast<T>(row1[x1]);
    }
    sum += y.weight[0][i][item] * upper + y.weight[1][i][item] * lower;
  }
  return sum;
}

// As backward_pixels, of one channel.
template <typename S, typename T>
OffsetGrad<T> backward_batched(
    const FeatureMapView<const S>& map,
    const BinBatch<T>& bins,
    int item,
    T gradient,
    bool wants_offset,
    const FeatureMapView<T>& input) {
  OffsetGrad<T> dweight{0, 0};
  const auto& y = bins.y;
  const int rows = static_cast<int>(y.count[item]);
  const int columns = static_cast<int>(bins.x.count[item]);
  BinSample<T> x[kMaxSamples]; // out of reach of the stores to the input
  for (int j = 0; j < columns; ++j) {
    x[j] = bins.x.sample(j, item);
  }
  for (int i = 0; i < rows; ++i) {
    const auto at_row = y.sample(i, item).tap;
    for (int k = 0; k < 2; ++k) {
      const S* pixels = map.pixel(at_row.at[k], 0);
      T weighted = 0, sloped = 0;
      for (int j = 0; wants_offset && j < columns; ++j) {
        const auto& tap = x[j].tap;
        const T v0 = static_cast<T>(pixels[tap.at[0] * map.column_stride]);
        const T v1 = static_cast<T>(pixels[tap.at[1] * map.column_stride]);
        weighted += tap.weight[0] * v0 + tap.weight[1] * v1;
        sloped += tap.dweight[0] * v0 + tap.dweight[1] * v1;
      }
      dweight.y += at_row.dweight[k] * weighted;
      dweight.x += at_row.weight[k] * sloped;
      if (input.data != nullptr) {
        T* to = input.pixel(at_row.at[k], 0);
        const T of_row = gradient * at_row.weight[k];
        for (int j = 0; j < columns; ++j) {
          const auto& tap = x[j].tap;
          to[tap.at[0] * input.column_stride] += of_row * tap.weight[0];
          to[tap.at[1] * input.column_stride] += of_row * tap.weight[1];
        }
      }
    }
  }
  return {dweight.y * gradient, dweight.x * gradient};
}

} // namespace dcn::cpu
