// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Two ways to pool the pixels of one bin, and their backward passes:
//   pool_vectorized   vector code over channels; the usual case
//   pool_per_channel  for fewer than kMinVectorChannels channels
// A third is in window_kernels.h.
#pragma once

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

} // namespace dcn::cpu
