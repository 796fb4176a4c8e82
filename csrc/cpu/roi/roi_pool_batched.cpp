// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "cpu/roi/roi_pool_batched.h"

#include <algorithm>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

namespace dcn {
namespace {

template <RoiMode kMode, typename T>
DCN_INLINE void find_samples(LaneAxis<T>& axis, int extent, int lanes) {
  std::fill_n(axis.kept, kLanes, T(0));
  const T most = *std::max_element(axis.count, axis.count + lanes);
  for (int i = 0; i < static_cast<int>(most); ++i) {
#pragma omp simd
    for (int lane = 0; lane < lanes; ++lane) {
      const T position = axis.first[lane] + static_cast<T>(i) * axis.step[lane];
      const auto sample = sample_at<kMode>(position, extent);
      axis.at[0][i][lane] = sample.tap.at[0];
      axis.at[1][i][lane] = sample.tap.at[1];
      axis.weight[0][i][lane] = sample.tap.weight[0];
      axis.weight[1][i][lane] = sample.tap.weight[1];
      axis.slope[0][i][lane] = sample.tap.slope[0];
      axis.slope[1][i][lane] = sample.tap.slope[1];
      const bool counts = sample.kept & (static_cast<T>(i) < axis.count[lane]);
      axis.kept[lane] += counts ? T(1) : T(0);
    }
  }
}

template <typename T>
DCN_INLINE void find_samples(
    LaneAxis<T>& axis,
    RoiMode mode,
    int extent,
    int lanes) {
  switch (mode) {
    case RoiMode::kBin:
      find_samples<RoiMode::kBin>(axis, extent, lanes);
      break;
    case RoiMode::kMsra:
      find_samples<RoiMode::kMsra>(axis, extent, lanes);
      break;
    default:
      find_samples<RoiMode::kAlign>(axis, extent, lanes);
  }
}

template <typename S>
DCN_INLINE bool is_finite_body(
    const MapView<const S>& map,
    int64_t channels,
    int height,
    int width) {
  using T = SumType<S>;
  T sum = 0; // of zeros, or NaN
  for (int64_t c = 0; c < channels; ++c) {
    for (int y = 0; y < height; ++y) {
      const S* pixel = map.pixel(y, 0) + c * map.channel_stride;
      if (map.column_stride == 1) {
#pragma omp simd reduction(+ : sum)
        for (int x = 0; x < width; ++x) {
          sum += T(0) * static_cast<T>(pixel[x]);
        }
      } else {
        for (int x = 0; x < width; ++x) {
          sum += T(0) * static_cast<T>(pixel[x * map.column_stride]);
        }
      }
    }
  }
  return sum == T(0);
}

} // namespace

template <>
DCN_VECTOR_CLONES void LaneAxis<float>::find(
    RoiMode mode,
    int extent,
    int lanes) {
  find_samples(*this, mode, extent, lanes);
}

template <>
DCN_VECTOR_CLONES void LaneAxis<double>::find(
    RoiMode mode,
    int extent,
    int lanes) {
  find_samples(*this, mode, extent, lanes);
}

#define DCN_DEFINE_IS_FINITE(S)                                               \
  template <>                                                                 \
  DCN_VECTOR_CLONES bool is_finite(                                           \
      const MapView<const S>& map, int64_t channels, int height, int width) { \
    return is_finite_body<S>(map, channels, height, width);                   \
  }

DCN_DEFINE_IS_FINITE(double)
DCN_DEFINE_IS_FINITE(float)
DCN_DEFINE_IS_FINITE(c10::Half)
DCN_DEFINE_IS_FINITE(c10::BFloat16)
#undef DCN_DEFINE_IS_FINITE

} // namespace dcn
