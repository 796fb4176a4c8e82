// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include <vector>

#include "math/roi_bin.h"

namespace dcn::cpu {

// The samples of a bin along one axis, summed per pixel: a bin is the product
// of two of these, so that each pixel is read once whatever the samples.
template <typename T>
class SeparableWeights {
 public:
  int begin = 0; // pixels outside [begin, end) have no weight
  int end = 0;
  T kept = 0; // samples that were not skipped

  explicit SeparableWeights(int extent) : weight_(extent), slope_(extent) {}

  T weight(int pixel) const {
    return weight_[pixel - begin];
  }
  // d weight / d position
  T dweight(int pixel) const {
    return slope_[pixel - begin];
  }

  void sum(const BinAxis<T>& bin) {
    sum_samples(bin.begin, bin.end, bin.step < T(0), [&](int64_t i) {
      return bin_sample(bin, i);
    });
  }

  // Samples [first, last), by number; `downwards` where each lies before the
  // one that precedes it, as in a box that is turned over.
  template <typename SampleOf>
  void sum_samples(
      int64_t first,
      int64_t last,
      bool downwards,
      const SampleOf& sample_of) {
    // In locals, which no store to the weights can change.
    int from = 0, to = 0;
    T samples = 0;
    T* const weights = weight_.data();
    T* const offset_grads = slope_.data();
    const auto add = [&](int at, T weight, T dweight) {
      if (at < to) {
        weights[at - from] += weight;
        offset_grads[at - from] += dweight;
        return;
      }
      for (; to < at; ++to) {
        weights[to - from] = offset_grads[to - from] = T(0);
      }
      weights[at - from] = weight;
      offset_grads[at - from] = dweight;
      ++to;
    };
    for (int64_t i = first; i < last; ++i) {
      const BinSample<T> sample =
          sample_of(downwards ? first + last - 1 - i : i);
      if (!sample.kept) {
        continue;
      }
      if (samples == T(0)) {
        from = to = sample.tap.at[0];
      }
      samples += T(1);
      add(sample.tap.at[0], sample.tap.weight[0], sample.tap.dweight[0]);
      add(sample.tap.at[1], sample.tap.weight[1], sample.tap.dweight[1]);
    }
    begin = from;
    end = to;
    kept = samples;
  }

 private:
  std::vector<T> weight_; // from `begin` on
  std::vector<T> slope_;
};

} // namespace dcn::cpu
