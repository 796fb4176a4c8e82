// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Sampling locations and bilinear weights of an offset group at a tile of
// output positions, computed once for all channels that share them. The values
// are stored in arrays along the positions, so that they are computed with
// vector code.
#pragma once

#include "cpu/buffer.h"
#include "ops/conv_offsets.h"

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

// The arrays of a plan, for loops that keep the pointers in registers. Tap and
// position are at index(tap, position), with corner k k * corner_stride
// further.
template <typename T>
struct PlannedTaps {
  const int* inside; // whether the tap reads the map
  const int64_t* pixels; // elements of the map
  // The weight of corner 0 is the value of a tap that is not inside.
  const T* masked_weights;
  // Sums over channels of grad_column * pixel, stored by the backward pass.
  T* corner_sums;
  int64_t tap_stride;
  int64_t corner_stride;

  DCN_INLINE int64_t index(int64_t tap, int64_t position) const {
    return tap * tap_stride + position;
  }
};

template <typename T>
class SamplingPlan {
 public:
  // Memory per tap and position.
  static constexpr int64_t kTapBytes =
      sizeof(int) + 4 * sizeof(int64_t) + 11 * sizeof(T);

  SamplingPlan(const ConvOffsets& source, int64_t max_positions);

  // Selects output positions [begin, end) of an image.
  void select(int64_t image, int64_t begin, int64_t end);

  // Computes the taps of the selected positions, for maps with these strides.
  void compute(int64_t offset_group, int64_t row_stride, int64_t column_stride);

  // Computes the gradients of dy, dx and mask from the corner sums. Element
  // (tap, i, position) is stored to out[(3 * tap + i) * out_stride + position].
  void compute_gradients(T* out, int64_t out_stride) const;

  PlannedTaps<T> taps() const {
    return {
        inside_.get(),
        pixels_.get(),
        masked_weights_.get(),
        corner_sums_.get(),
        max_positions_,
        size_};
  }

 private:
  TapInputs<T> inputs(int64_t tap) const;

  const ConvOffsets& source_;
  int64_t max_positions_;
  int64_t size_; // taps * max_positions_
  int64_t image_ = 0;
  int64_t begin_ = 0;
  int64_t count_ = 0;
  // (taps, positions)
  Buffer<int> inside_;
  // (4, taps, positions): corners
  Buffer<int64_t> pixels_;
  Buffer<T> masked_weights_;
  Buffer<T> corner_sums_;
  // (3, taps, positions): dy, dx, mask
  Buffer<T> offsets_;
  // The regular grid: (kernel_h + kernel_w, positions).
  Buffer<T> grid_;
};

} // namespace dcn::cpu
