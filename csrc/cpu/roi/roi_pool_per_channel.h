// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// The pixels of one bin of a few channels, one channel after the other: what
// the vector code of roi_pixels.h has too little to do for.
#pragma once

#include "cpu/roi/roi_pool_vectorized.h"

namespace dcn::cpu {

// As pool_pixels.
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
        // A pixel without weight is not read: it may be infinite.
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

// As backward_pixels.
template <typename S, typename T>
OffsetGrad<T> backward_per_channel(
    const FeatureMapView<const S>& map,
    const SeparableWeights<T>& y,
    const SeparableWeights<T>& x,
    int64_t channels,
    const T* gradient,
    bool wants_offset,
    const FeatureMapView<T>& input) {
  OffsetGrad<T> dweight{0, 0};
  for (int64_t c = 0; c < channels; ++c) {
    for (int row = y.begin; row < y.end; ++row) {
      const S* pixel = map.pixel(row, x.begin) + c * map.channel_stride;
      const T weight_y = y.weight(row);
      for (int column = x.begin; wants_offset && column < x.end; ++column) {
        const T along_y = y.dweight(row) * x.weight(column);
        const T along_x = weight_y * x.dweight(column);
        if (along_y != T(0) || along_x != T(0)) {
          const T sum = gradient[c] * static_cast<T>(*pixel);
          dweight.y += along_y * sum;
          dweight.x += along_x * sum;
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
  return dweight;
}

} // namespace dcn::cpu
