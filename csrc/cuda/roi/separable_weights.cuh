// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include "math/roi_bin.h"

namespace dcn::cuda {

// Iterates over the pixels that the samples of a bin read along one axis, in
// ascending order. The bilinear weights of all samples are summed per pixel.
// The samples of a bin form a grid, so the weight of a pixel is the product of
// its weights along y and x, and each pixel is read once, whatever the number
// of samples.
template <typename T>
class SeparableWeights {
 public:
  int pixel = 0;
  T weight = 0;
  T dweight = 0; // d weight / d position of the bin

  __device__ explicit SeparableWeights(const BinAxis<T>& bin) : bin_(bin) {}

  // Advances to the next pixel; returns false after the last one.
  __device__ __forceinline__ bool next() {
    bool found = reads_next_;
    ++pixel;
    weight = next_weight_;
    dweight = next_dweight_;
    reads_next_ = false;
    next_weight_ = next_dweight_ = T(0);
    while (pending_ || fetch()) {
      pixel = found ? pixel : tap_.pixel[0];
      found = true;
      pending_ = tap_.pixel[0] != pixel;
      if (pending_) {
        break;
      }
      weight += tap_.weight[0];
      dweight += tap_.dweight[0];
      if (tap_.pixel[1] == pixel) { // the neighbour lies outside the map
        weight += tap_.weight[1];
        dweight += tap_.dweight[1];
      } else {
        reads_next_ = true;
        next_weight_ += tap_.weight[1];
        next_dweight_ += tap_.dweight[1];
      }
    }
    return found;
  }

 private:
  // Loads the next sample that is not skipped, in ascending order of position:
  // from the last one, where the step is negative.
  __device__ __forceinline__ bool fetch() {
    for (; visited_ < bin_.end - bin_.begin; ++visited_) {
      const int64_t i =
          bin_.step < T(0) ? bin_.end - 1 - visited_ : bin_.begin + visited_;
      const BinSample<T> sample = bin_sample(bin_, i);
      if (sample.kept) {
        tap_ = sample.tap;
        ++visited_;
        return true;
      }
    }
    return false;
  }

  const BinAxis<T>& bin_;
  int64_t visited_ = 0;
  LinearWeights<T> tap_; // of the last sample loaded
  bool pending_ = false; // the last sample starts at a later pixel
  bool reads_next_ = false; // samples so far also read the next pixel
  T next_weight_ = 0;
  T next_dweight_ = 0;
};

} // namespace dcn::cuda
