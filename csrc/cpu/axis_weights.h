// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include <algorithm>
#include <vector>

#include "math/roi_bin.h"

namespace dcn {

// The samples of a bin along one axis, summed per pixel: a bin is the product
// of two of these, so that each pixel is read once whatever the samples.
template <typename T>
struct AxisWeights {
  std::vector<T> weight; // of each pixel of the axis
  std::vector<T> slope; // d weight / d position
  int begin = 0; // pixels outside [begin, end) have neither
  int end = 0;
  T kept = 0; // samples that were not skipped

  explicit AxisWeights(int extent) : weight(extent), slope(extent) {}

  void sum(const BinAxis<T>& bin) {
    std::fill(weight.begin() + begin, weight.begin() + end, T(0));
    std::fill(slope.begin() + begin, slope.begin() + end, T(0));
    begin = static_cast<int>(weight.size());
    end = 0;
    kept = 0;
    for (int64_t i = bin.begin; i < bin.end; ++i) {
      const BinSample<T> sample = bin_sample(bin, i);
      if (!sample.kept) {
        continue;
      }
      kept += T(1);
      for (int k = 0; k < 2; ++k) {
        const int at = sample.tap.at[k];
        weight[at] += sample.tap.weight[k];
        slope[at] += sample.tap.slope[k];
        begin = std::min(begin, at);
        end = std::max(end, at + 1);
      }
    }
    begin = std::min(begin, end);
  }
};

} // namespace dcn
