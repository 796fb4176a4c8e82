// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include "math/roi_bin.h"

namespace dcn::cuda {

// The samples of a bin along one axis, summed per pixel, one pixel after the
// other: a bin is the product of two of these, so that each of its pixels is
// read once whatever the samples.
template <typename T>
class SeparableWeights {
 public:
  int pixel = 0;
  T weight = 0;
  T dweight = 0; // d weight / d position

  __device__ explicit SeparableWeights(const BinAxis<T>& bin) : bin_(bin) {}

  // Goes to the next pixel that samples read, upwards; false behind the last.
  __device__ __forceinline__ bool next() {
    bool found = carries_;
    ++pixel;
    weight = carried_weight_;
    dweight = carried_slope_;
    carries_ = false;
    carried_weight_ = carried_slope_ = T(0);
    while (waits_ || fetch()) {
      pixel = found ? pixel : tap_.at[0];
      found = true;
      waits_ = tap_.at[0] != pixel;
      if (waits_) {
        break;
      }
      weight += tap_.weight[0];
      dweight += tap_.dweight[0];
      if (tap_.at[1] == pixel) { // the neighbour lies outside the map
        weight += tap_.weight[1];
        dweight += tap_.dweight[1];
      } else {
        carries_ = true;
        carried_weight_ += tap_.weight[1];
        carried_slope_ += tap_.dweight[1];
      }
    }
    return found;
  }

 private:
  // Takes the next sample that is kept. Where the box, and with it the step, is
  // turned over, the last one comes first.
  __device__ __forceinline__ bool fetch() {
    for (; taken_ < bin_.end - bin_.begin; ++taken_) {
      const int64_t i =
          bin_.step < T(0) ? bin_.end - 1 - taken_ : bin_.begin + taken_;
      const BinSample<T> sample = bin_sample(bin_, i);
      if (sample.kept) {
        tap_ = sample.tap;
        ++taken_;
        return true;
      }
    }
    return false;
  }

  const BinAxis<T>& bin_;
  int64_t taken_ = 0;
  LinearWeights<T> tap_; // of the sample taken last
  bool waits_ = false; // for a later pixel
  bool carries_ = false; // samples so far read the next pixel
  T carried_weight_ = 0;
  T carried_slope_ = 0;
};

} // namespace dcn::cuda
