// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Three ways to pool the pixels of one bin, and their backward passes:
//   pool_vectorized   vector code over channels; the usual case
//   pool_per_channel  for fewer than kMinVectorChannels channels
//   pool_batched      for few channels per class: the same bin of many RoIs,
//                     whose pixels and weights are computed in vector code
#pragma once

#include <vector>

#include "cpu/roi/separable_weights.h"
#include "ops/feature_map_view.h"
#include "ops/roi_geometry.h"

namespace dcn::cpu {

// Fewer channels are pooled one after the other.
constexpr int64_t kMinVectorChannels = 8;

// sums[c] = weighted sum over the pixels of the bin, vectorized over channels.
template <typename S, typename T>
void pool_vectorized(
    const FeatureMapView<const S>& map,
    const SeparableWeights<T>& y,
    const SeparableWeights<T>& x,
    int64_t channels,
    T* sums);

// Gradient of the position of a bin along y and x.
template <typename T>
struct OffsetGrad {
  T y;
  T x;
};

// Adds gradient[c] * weight to `input`, unless its data is null. Returns the
// gradient of the bin's position, if wants_offset.
template <typename S, typename T>
OffsetGrad<T> backward_vectorized(
    const FeatureMapView<const S>& map,
    const SeparableWeights<T>& y,
    const SeparableWeights<T>& x,
    int64_t channels,
    const T* gradient,
    bool wants_offset,
    const FeatureMapView<T>& input);

// As pool_vectorized, one channel after the other: for a few channels.
template <typename S, typename T>
void pool_per_channel(
    const FeatureMapView<const S>& map,
    const SeparableWeights<T>& y,
    const SeparableWeights<T>& x,
    int64_t channels,
    T* sums) {
  for (int64_t c = 0; c < channels; ++c) {
    T sum = 0;
    for (int row = y.begin; row < y.end; ++row) {
      const T along_y = y.weight(row);
      const S* pixel = map.pixel(row, x.begin) + c * map.channel_stride;
      T of_row = 0;
      for (int column = x.begin; column < x.end; ++column) {
        // Pixels without weight are skipped: they may be infinite.
        const T weight = x.weight(column);
        if (weight != T(0) && along_y != T(0)) {
          of_row += weight * static_cast<T>(*pixel);
        }
        pixel += map.column_stride;
      }
      sum += along_y * of_row;
    }
    sums[c] = sum;
  }
}

// As backward_vectorized, one channel after the other.
template <typename S, typename T>
OffsetGrad<T> backward_per_channel(
    const FeatureMapView<const S>& map,
    const SeparableWeights<T>& y,
    const SeparableWeights<T>& x,
    int64_t channels,
    const T* gradient,
    bool wants_offset,
    const FeatureMapView<T>& input) {
  OffsetGrad<T> grad{0, 0};
  for (int64_t c = 0; c < channels; ++c) {
    for (int row = y.begin; row < y.end; ++row) {
      const S* pixel = map.pixel(row, x.begin) + c * map.channel_stride;
      const T weight_y = y.weight(row);
      for (int column = x.begin; wants_offset && column < x.end; ++column) {
        const T along_y = y.dweight(row) * x.weight(column);
        const T along_x = weight_y * x.dweight(column);
        if (along_y != T(0) || along_x != T(0)) {
          const T sum = gradient[c] * static_cast<T>(*pixel);
          grad.y += along_y * sum;
          grad.x += along_x * sum;
        }
        pixel += map.column_stride;
      }
      if (input.data == nullptr || weight_y == T(0)) {
        continue;
      }
      T* to = input.pixel(row, x.begin) + c * input.channel_stride;
      for (int column = x.begin; column < x.end; ++column) {
        if (x.weight(column) != T(0)) {
          *to += weight_y * x.weight(column) * gradient[c];
        }
        to += input.column_stride;
      }
    }
  }
  return grad;
}

constexpr int kBatchSize = 16;
// Bins with more samples along an axis are not batched.
constexpr int kMaxSamples = 8;

// Samples of a batch of bins along one axis.
template <typename T>
struct BinBatchAxis {
  T first_position[kBatchSize];
  T step[kBatchSize];
  T count[kBatchSize]; // samples
  T kept[kBatchSize]; // samples that are not skipped
  int pixel[2][kMaxSamples][kBatchSize];
  T weight[2][kMaxSamples][kBatchSize];
  T dweight[2][kMaxSamples][kBatchSize];

  void set(int item, const BinAxis<T>& bin) {
    first_position[item] = bin.first_position;
    step[item] = bin.step;
    count[item] = bin.count;
  }
  // Computes pixels and weights of all samples; skipped ones get weight 0.
  void compute_samples(RoiMode mode, int extent, int batch);

  BinSample<T> sample(int64_t i, int item) const {
    BinSample<T> sample;
    sample.kept = true; // skipped ones have weight 0
    for (int k = 0; k < 2; ++k) {
      sample.tap.pixel[k] = pixel[k][i][item];
      sample.tap.weight[k] = weight[k][i][item];
      sample.tap.dweight[k] = dweight[k][i][item];
    }
    return sample;
  }
};

// The same bin of the same class of several RoIs.
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
  // Returns whether the bin was added.
  bool try_add(int64_t roi_index, const RoiBin<T>& located) {
    if (located.state != RoiState::kInside ||
        !(located.y.count <= T(kMaxSamples)) ||
        !(located.x.count <= T(kMaxSamples))) {
      return false;
    }
    roi[size] = roi_index;
    image[size] = located.image;
    offset_scale_y[size] = located.offset_scale_y;
    offset_scale_x[size] = located.offset_scale_x;
    y.set(size, located.y);
    x.set(size, located.x);
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

// Whether no pixel is infinite or NaN. Only then may pool_batched and
// backward_batched be used, which read pixels without weight too.
template <typename S>
bool is_finite(
    const FeatureMapView<const S>& map,
    int64_t channels,
    int height,
    int width);

// Caches is_finite() for the maps of several images.
template <typename S>
class FiniteMapCache {
 public:
  FiniteMapCache(
      int64_t first_image,
      int64_t images,
      Size2d map,
      int64_t channels)
      : first_(first_image), state_(images), map_(map), channels_(channels) {}

  bool operator()(int64_t image, const FeatureMapView<const S>& view) {
    auto& state = state_[image - first_];
    if (state == State::kUnknown) {
      state = is_finite(view, channels_, map_.h, map_.w) ? State::kFinite
                                                         : State::kInfinite;
    }
    return state == State::kFinite;
  }

 private:
  enum class State : char { kUnknown, kFinite, kInfinite };
  int64_t first_;
  std::vector<State> state_;
  Size2d map_;
  int64_t channels_;
};

// Weighted sum over the pixels of one bin of the batch, of the first channel.
template <typename S, typename T>
T pool_batched(
    const FeatureMapView<const S>& map,
    const BinBatch<T>& bins,
    int item) {
  T sum = 0;
  const auto& y = bins.y;
  const auto& x = bins.x;
  for (int i = 0; i < static_cast<int>(y.count[item]); ++i) {
    const S* row0 = map.pixel(y.pixel[0][i][item], 0);
    const S* row1 = map.pixel(y.pixel[1][i][item], 0);
    T upper = 0, lower = 0;
    for (int j = 0; j < static_cast<int>(x.count[item]); ++j) {
      const int64_t x0 = x.pixel[0][j][item] * map.column_stride;
      const int64_t x1 = x.pixel[1][j][item] * map.column_stride;
      const T w0 = x.weight[0][j][item], w1 = x.weight[1][j][item];
      upper += w0 * static_cast<T>(row0[x0]) + w1 * static_cast<T>(row0[x1]);
      lower += w0 * static_cast<T>(row1[x0]) + w1 * static_cast<T>(row1[x1]);
    }
    sum += y.weight[0][i][item] * upper + y.weight[1][i][item] * lower;
  }
  return sum;
}

// As backward_vectorized, of one bin of the batch and the first channel.
template <typename S, typename T>
OffsetGrad<T> backward_batched(
    const FeatureMapView<const S>& map,
    const BinBatch<T>& bins,
    int item,
    T gradient,
    bool wants_offset,
    const FeatureMapView<T>& input) {
  OffsetGrad<T> grad{0, 0};
  const auto& y = bins.y;
  const int rows = static_cast<int>(y.count[item]);
  const int columns = static_cast<int>(bins.x.count[item]);
  // A local copy, not aliased by the stores to `input`.
  BinSample<T> x[kMaxSamples];
  for (int j = 0; j < columns; ++j) {
    x[j] = bins.x.sample(j, item);
  }
  for (int i = 0; i < rows; ++i) {
    const auto row = y.sample(i, item).tap;
    for (int k = 0; k < 2; ++k) {
      const S* pixels = map.pixel(row.pixel[k], 0);
      T sum = 0, dsum = 0;
      for (int j = 0; wants_offset && j < columns; ++j) {
        const auto& tap = x[j].tap;
        const T v0 = static_cast<T>(pixels[tap.pixel[0] * map.column_stride]);
        const T v1 = static_cast<T>(pixels[tap.pixel[1] * map.column_stride]);
        sum += tap.weight[0] * v0 + tap.weight[1] * v1;
        dsum += tap.dweight[0] * v0 + tap.dweight[1] * v1;
      }
      grad.y += row.dweight[k] * sum;
      grad.x += row.weight[k] * dsum;
      if (input.data != nullptr) {
        T* to = input.pixel(row.pixel[k], 0);
        const T row_weight = gradient * row.weight[k];
        for (int j = 0; j < columns; ++j) {
          const auto& tap = x[j].tap;
          to[tap.pixel[0] * input.column_stride] += row_weight * tap.weight[0];
          to[tap.pixel[1] * input.column_stride] += row_weight * tap.weight[1];
        }
      }
    }
  }
  return {grad.y * gradient, grad.x * gradient};
}

} // namespace dcn::cpu
