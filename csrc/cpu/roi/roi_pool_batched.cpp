// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "cpu/roi/roi_pool_batched.h"

#include <algorithm>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

namespace dcn::cpu {
namespace {

template <RoiMode kMode, typename T>
DCN_INLINE void compute_axis_samples(BinBatchAxis<T>& axis, int extent, int batch) {
  std::fill_n(axis.kept, kBatchSize, T(0));
  const T most = *std::max_element(axis.count, axis.count + batch);
  for (int i = 0; i < static_cast<int>(most); ++i) {
#pragma omp simd
    for (int item = 0; item < batch; ++item) {
      const T position = axis.first[item] + static_cast<T>(i) * axis.step[item];
      const auto sample = sample_at<kMode>(position, extent);
      axis.at[0][i][item] = sample.tap.at[0];
      axis.at[1][i][item] = sample.tap.at[1];
      axis.weight[0][i][item] = sample.tap.weight[0];
      axis.weight[1][i][item] = sample.tap.weight[1];
      axis.dweight[0][i][item] = sample.tap.dweight[0];
      axis.dweight[1][i][item] = sample.tap.dweight[1];
      const bool counts = sample.kept & (static_cast<T>(i) < axis.count[item]);
      axis.kept[item] += counts ? T(1) : T(0);
    }
  }
}

template <typename T>
DCN_INLINE void compute_axis_samples(
    BinBatchAxis<T>& axis,
    RoiMode mode,
    int extent,
    int batch) {
  switch (mode) {
    case RoiMode::kBin:
      compute_axis_samples<RoiMode::kBin>(axis, extent, batch);
      break;
    case RoiMode::kMsra:
      compute_axis_samples<RoiMode::kMsra>(axis, extent, batch);
      break;
    default:
      compute_axis_samples<RoiMode::kAlign>(axis, extent, batch);
  }
}

template <typename S>
DCN_INLINE bool is_finite_body(
    const FeatureMapView<const S>& map,
    int64_t channels,
    int height,
    int width) {
  using T = OpMathType<S>;
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
DCN_VECTOR_CLONES void BinBatchAxis<float>::compute_samples(
    RoiMode mode,
    int extent,
    int batch) {
  compute_axis_samples(*this, mode, extent, batch);
}

template <>
DCN_VECTOR_CLONES void BinBatchAxis<double>::compute_samples(
    RoiMode mode,
    int extent,
    int batch) {
  compute_axis_samples(*this, mode, extent, batch);
}

#define DCN_DEFINE_IS_FINITE(S)                             \
  template <>                                               \
  DCN_VECTOR_CLONES bool is_finite(                         \
      const FeatureMapView<const S>& map,                   \
      int64_t channels,                                     \
      int height,                                           \
      int width) {                                          \
    return is_finite_body<S>(map, channels, height, width); \
  }

DCN_DEFINE_IS_FINITE(double)
DCN_DEFINE_IS_FINITE(float)
DCN_DEFINE_IS_FINITE(c10::Half)
DCN_DEFINE_IS_FINITE(c10::BFloat16)
#undef DCN_DEFINE_IS_FINITE

} // namespace dcn::cpu
