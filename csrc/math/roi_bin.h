// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// How a RoI is divided into bins and a bin into samples. The samples of a bin
// form a grid, so everything here is for one axis.
#pragma once

#include <cmath>
#include <cstdint>

#include "math/bilinear.h"

namespace dcn {

enum class RoiMode : int {
  kAlign, // as RoIAlign: centred samples, clamped at the border
  kBin, // Eq. 5-6: every pixel of a bin with integer borders
  kMsra // as the operator released by the authors
};

// A RoI along one axis, in pixels of the feature map. Offsets are multiplied by
// its size.
template <typename T>
struct RoiAxis {
  T start;
  T size;
  T bin_size;
  T count; // samples per bin; not for kBin
  T step; // from sample to sample; not for kBin
};

template <typename T>
DCN_INLINE RoiAxis<T> make_roi_axis(
    RoiMode mode,
    T low,
    T high,
    T scale,
    int bins,
    int64_t sampling_ratio) {
  RoiAxis<T> axis{};
  if (mode == RoiMode::kBin) {
    axis.start = std::floor(low * scale + T(0.5));
    const T size = std::floor(high * scale + T(0.5)) - axis.start;
    axis.size = size < T(1) ? T(1) : size;
    return axis;
  }
  if (mode == RoiMode::kMsra) {
    axis.start = std::round(low) * scale - T(0.5);
    const T size = (std::round(high) + T(1)) * scale - T(0.5) - axis.start;
    axis.size = size < T(0.1) ? T(0.1) : size;
  } else {
    axis.start = low * scale - T(0.5);
    axis.size = high * scale - T(0.5) - axis.start;
  }
  axis.bin_size = axis.size / bins;
  if (sampling_ratio > 0) {
    axis.count = static_cast<T>(sampling_ratio);
  } else if (mode == RoiMode::kMsra) {
    axis.count = T(4);
  } else {
    const T adaptive = std::ceil(axis.bin_size);
    axis.count = adaptive > T(0) ? adaptive : T(0);
  }
  axis.step = axis.count > T(0) ? axis.bin_size / axis.count : T(0);
  return axis;
}

// The samples of one bin along one axis: first_position + i * step for i in
// [0, count). Only those in [begin, end) may lie on the map.
template <typename T>
struct BinAxis {
  RoiMode mode;
  int extent; // of the map
  T first_position;
  T step;
  T count; // may exceed every integer type
  int64_t begin;
  int64_t end;
};

// A sample's bilinear weights; all 0 if it is skipped.
template <typename T>
struct BinSample {
  bool kept;
  LinearWeights<T> tap;
};

template <typename T>
DCN_INLINE int64_t saturate_to_index(T value, T highest) {
  // Written so that NaN gives 0.
  const T limit = highest < T(1e18) ? highest : T(1e18);
  return value > T(0) ? static_cast<int64_t>(value < limit ? value : limit) : 0;
}

// Sets [begin, end): a superset of the samples on the map, by two on each side,
// or all samples where they are few.
template <typename T>
DCN_INLINE void clip_to_map(BinAxis<T>& bin) {
  bin.begin = 0;
  bin.end = 0;
  if (bin.count <= T(8)) {
    bin.end = static_cast<int64_t>(bin.count);
    return;
  }
  const T first = bin.first_position;
  const T low = T(-1), high = static_cast<T>(bin.extent);
  if (!(bin.count >= T(1)) || !(std::fabs(first) <= T(1e30))) {
    return;
  }
  if (bin.step == T(0)) {
    if (first >= low && first <= high) {
      bin.end = saturate_to_index(bin.count, bin.count);
    }
    return;
  }
  const T at_low = (low - first) / bin.step;
  const T at_high = (high - first) / bin.step;
  const T from = at_low < at_high ? at_low : at_high;
  const T to = at_low < at_high ? at_high : at_low;
  bin.begin = saturate_to_index(std::floor(from) - T(2), bin.count);
  bin.end = saturate_to_index(std::ceil(to) + T(3), bin.count);
  // Large values of T cannot represent neighbouring indices.
  const int64_t max_count = saturate_to_index(to - from + T(6), bin.count);
  bin.end = bin.end - bin.begin > max_count ? bin.begin + max_count : bin.end;
}

// Bin `index` of the `bins` of a RoI, shifted by `shift` pixels.
template <typename T>
DCN_INLINE BinAxis<T> make_bin_axis(
    RoiMode mode,
    int extent,
    const RoiAxis<T>& roi,
    int index,
    int bins,
    T shift) {
  BinAxis<T> bin;
  bin.mode = mode;
  bin.extent = extent;
  if (mode == RoiMode::kBin) {
    const T low = std::floor(index * roi.size / bins);
    const T high = std::ceil((index + 1) * roi.size / bins);
    bin.first_position = roi.start + low + shift;
    bin.step = T(1);
    bin.count = high - low;
  } else {
    const T start = roi.start + index * roi.bin_size + shift;
    bin.count = roi.count;
    bin.step = roi.step;
    bin.first_position =
        mode == RoiMode::kMsra ? start : start + T(0.5) * bin.step;
  }
  clip_to_map(bin);
  return bin;
}

// The sample at a position. Without branches, so that loops over it are
// vectorized.
template <RoiMode kMode, typename T>
DCN_INLINE BinSample<T> sample_at(T position, int extent) {
  const T last = static_cast<T>(extent - 1);
  BinSample<T> sample;
  if (kMode == RoiMode::kBin) {
    // At -1 the weight is 0, but the right-hand derivative is not.
    sample.kept = (position >= T(-1)) & (position < static_cast<T>(extent));
    sample.tap = linear_weights(sample.kept ? position : T(0), extent);
  } else {
    const T margin = kMode == RoiMode::kAlign ? T(1) : T(0.5);
    sample.kept = (position >= -margin) & (position <= last + margin);
    const T low = position > T(0) ? position : T(0);
    const T inside = low < last ? low : last;
    sample.tap = linear_weights(sample.kept ? inside : T(0), extent);
    const bool clamped = (position < T(0)) | (position >= last);
    // At an integer, floor and ceil are the same pixel.
    const bool at_pixel =
        kMode == RoiMode::kMsra && sample.tap.weight[1] == T(0);
    const bool no_gradient = clamped | at_pixel;
    sample.tap.dweight[0] = no_gradient ? T(0) : sample.tap.dweight[0];
    sample.tap.dweight[1] = no_gradient ? T(0) : sample.tap.dweight[1];
  }
  for (int k = 0; k < 2; ++k) {
    sample.tap.weight[k] = sample.kept ? sample.tap.weight[k] : T(0);
    sample.tap.dweight[k] = sample.kept ? sample.tap.dweight[k] : T(0);
  }
  return sample;
}

// Sample i of a bin, i in [begin, end).
template <typename T>
DCN_INLINE BinSample<T> bin_sample(const BinAxis<T>& bin, int64_t i) {
  const T position = bin.first_position + static_cast<T>(i) * bin.step;
  switch (bin.mode) {
    case RoiMode::kBin:
      return sample_at<RoiMode::kBin>(position, bin.extent);
    case RoiMode::kMsra:
      return sample_at<RoiMode::kMsra>(position, bin.extent);
    default:
      return sample_at<RoiMode::kAlign>(position, bin.extent);
  }
}

// What the sum of a bin is divided by; 0 if all samples are skipped.
template <typename T>
DCN_INLINE T
bin_divisor(RoiMode mode, T count_y, T count_x, T kept_y, T kept_x) {
  if (kept_y == T(0) || kept_x == T(0)) {
    return T(0);
  }
  return mode == RoiMode::kMsra ? kept_y * kept_x : count_y * count_x;
}

template <typename T>
DCN_INLINE T
bin_divisor(const BinAxis<T>& y, const BinAxis<T>& x, T kept_y, T kept_x) {
  return bin_divisor(y.mode, y.count, x.count, kept_y, kept_x);
}

} // namespace dcn
