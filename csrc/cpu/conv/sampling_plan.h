// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Sampling locations and bilinear weights of an offset group at a tile of
// output positions, computed once for all channels that share them. The values
// are stored in arrays along the positions, so that they are computed with
// vector code.
#pragma once

#include <vector>

#include "cpu/buffer.h"
#include "ops/conv_offsets.h"
#include "ops/feature_map_view.h"

namespace dcn::cpu {

// What the locations of one tap are computed from, along the positions.
template <typename T>
struct TapInputs {
  const T* grid_y;
  const T* grid_x;
  const T* dy;
  const T* dx;
  const T* mask;
  int in_h;
  int in_w;

  DCN_INLINE DeformTap<T> locate(int64_t i) const {
    return locate_tap(
        grid_y[i] + dy[i], grid_x[i] + dx[i], mask[i], in_h, in_w);
  }
};

// Where the four corners of a tap are, in one number: the element of corner 0,
// and what follows in the low bits.
enum CornerBits : int64_t {
  kHasRight = 1, // corners 1 and 3 are a column further, else corners 0 and 2
  kHasBelow = 2, // corners 2 and 3 are a row further, else corners 0 and 1
  kReadsMap = 4 // otherwise no corner is read
};
constexpr int kCornerShift = 3; // of the element

// The corners, for a map with the strides that the plan was computed for.
template <typename S>
DCN_INLINE void decode_corners(
    int64_t corners,
    const FeatureMapView<S>& map,
    S* (&pixels)[4]) {
  S* const first = map.data + (corners >> kCornerShift);
  const int64_t right =
      (corners & kHasRight) != 0 ? map.column_stride : int64_t{0};
  const int64_t below =
      (corners & kHasBelow) != 0 ? map.row_stride : int64_t{0};
  pixels[0] = first;
  pixels[1] = first + right;
  pixels[2] = first + below;
  pixels[3] = first + below + right;
}

// The arrays of a plan, for loops that keep the pointers in registers. Tap and
// position are at index(tap, position), with weight and sum of corner k
// k * corner_stride further. kAhead positions after the last are read to
// prefetch their pixels: those of corner 0.
template <typename T>
struct PlannedTaps {
  static constexpr int64_t kAhead = 8;

  const int64_t* corners; // see CornerBits
  // The weight of corner 0 is the value of a tap that does not read the map.
  const T* masked_weights;
  // Sums over channels of grad_column * pixel, stored by the backward pass.
  T* corner_sums;
  int64_t tap_stride;
  int64_t corner_stride;

  DCN_INLINE int64_t index(int64_t tap, int64_t position) const {
    return tap * tap_stride + position;
  }
  DCN_INLINE bool reads_map(int64_t index) const {
    return (corners[index] & kReadsMap) != 0;
  }
};

template <typename T>
class SamplingPlan {
 public:
  // Memory per tap and position.
  static constexpr int64_t kTapBytes = sizeof(int64_t) + 11 * sizeof(T);

  SamplingPlan(const ConvOffsets& source, int64_t max_positions);

  // Selects output positions [begin, end) of an image.
  void select(int64_t image, int64_t begin, int64_t end);

  // Output positions [begin, end) of an offset group.
  struct Part {
    int64_t offset_group;
    int64_t begin;
    int64_t end;
  };

  // Computes the taps of the selected positions, for maps with these strides.
  // Prefetches the offset and mask of the part that is next.
  void compute(
      int64_t offset_group,
      int64_t row_stride,
      int64_t column_stride,
      const Part& next);

  // Computes the gradients of dy, dx and mask from the corner sums. Element
  // (tap, i, position) is stored to out[(3 * tap + i) * out_stride + position].
  void compute_gradients(T* out, int64_t out_stride) const;

  PlannedTaps<T> taps() const {
    return {
        corners_.get(),
        masked_weights_.get(),
        corner_sums_.get(),
        max_positions_,
        size_};
  }

 private:
  // The selected positions of a channel of the offset or mask: where they are,
  // or in `buffer` if they are not contiguous.
  const T* positions(const AnyDtypeView& view, int64_t channel, T* buffer)
      const;

  const ConvOffsets& source_;
  int64_t max_positions_;
  int64_t size_; // taps * max_positions_
  int64_t image_ = 0;
  int64_t begin_ = 0;
  int64_t count_ = 0;
  Buffer<int64_t> corners_; // (taps, positions)
  // (4, taps, positions)
  Buffer<T> masked_weights_;
  Buffer<T> corner_sums_;
  // (3, taps, positions): dy, dx, mask, where positions() needs it
  Buffer<T> offsets_;
  Buffer<T> ones_; // (positions), in place of a mask
  std::vector<TapInputs<T>> inputs_; // of each tap
  // The regular grid: (kernel_h + kernel_w, positions).
  Buffer<T> grid_;
};

} // namespace dcn::cpu
