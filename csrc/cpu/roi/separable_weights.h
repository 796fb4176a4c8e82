// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include <vector>

#include "math/roi_bin.h"

namespace dcn::cpu {

// The bilinear weights of all samples of a bin along one axis, summed per
// pixel. The samples of a bin form a grid, so the weight of a pixel is the
// product of its weights along y and x, and each pixel is read once, whatever
// the number of samples.
template <typename T>
class SeparableWeights {
 public:
  int begin = 0; // pixels outside [begin, end) have no weight
  int end = 0;
  T kept = 0; // samples that were not skipped

  explicit SeparableWeights(int extent) : weight_(extent), dweight_(extent) {}

  T weight(int pixel) const {
    return weight_[pixel - begin];
  }
  // d weight / d position of the bin
  T dweight(int pixel) const {
    return dweight_[pixel - begin];
  }

  void accumulate(const BinAxis<T>& bin) {
    accumulate_samples(bin.begin, bin.end, bin.step < T(0), [&](int64_t i) {
      return bin_sample(bin, i);
    });
  }

  // Samples [first, last), by index. `descending`: each sample lies before the
  // previous one, as in a box with negative size.
  template <typename SampleAt>
  void accumulate_samples(
      int64_t first,
      int64_t last,
      bool descending,
      const SampleAt& sample_at_index) {
    // Locals, not aliased by the stores to the weights.
    int from = 0, to = 0;
    T samples = 0;
    T* const weights = weight_.data();
    T* const dweights = dweight_.data();
    const auto add = [&](int at, T weight, T dweight) {
      if (at < to) {
        weights[at - from] += weight;
        dweights[at - from] += dweight;
        return;
      }
      for (; to < at; ++to) {
        weights[to - from] = dweights[to - from] = T(0);
      }
      weights[at - from] = weight;
      dweights[at - from] = dweight;
      ++to;
    };
    for (int64_t i = first; i < last; ++i) {
      const BinSample<T> sample =
          sample_at_index(descending ? first + last - 1 - i : i);
      if (!sample.kept) {
        continue;
      }
      if (samples == T(0)) {
        from = to = sample.tap.pixel[0];
      }
      samples += T(1);
      add(sample.tap.pixel[0], sample.tap.weight[0], sample.tap.dweight[0]);
      add(sample.tap.pixel[1], sample.tap.weight[1], sample.tap.dweight[1]);
    }
    begin = from;
    end = to;
    kept = samples;
  }

 private:
  std::vector<T> weight_; // of pixels from `begin` on
  std::vector<T> dweight_;
};

} // namespace dcn::cpu
