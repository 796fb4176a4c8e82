// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Sampling locations of a deformable convolution, their bilinear weights and
// the gradients of offset and mask.

#pragma once

#include <cstdint>

#include "math/bilinear.h"

namespace dcn {

// Sizes of a convolution.
struct ConvGeometry {
  int in_h, in_w;
  int out_h, out_w;
  int kernel_h, kernel_w;
  int stride_h, stride_w;
  int pad_h, pad_w;
  int dilation_h, dilation_w;

  DCN_INLINE int taps() const {
    return kernel_h * kernel_w;
  }
  DCN_INLINE int64_t positions() const {
    return static_cast<int64_t>(out_h) * out_w;
  }
};

enum class TapState : int {
  kInside, // reads the four corners
  kOutside, // outside the map: reads no pixel, counts as zero
  kNan // offset or mask is NaN: so are the value and their gradients
};

// One sampling location p0 + pn + dpn of Eq. 2 and its four corner pixels.
// Corner k is row k >> 1, column k & 1.
template <typename T>
struct DeformTap {
  TapState state;
  T mask;
  LinearWeights<T> y;
  LinearWeights<T> x;

  DCN_INLINE T weight(int corner) const {
    return y.weight[corner >> 1] * x.weight[corner & 1];
  }
  // 0 for a corner without weight, even if the mask is infinite.
  DCN_INLINE T masked_weight(int corner) const {
    const T unmasked = weight(corner);
    return unmasked == T(0) ? unmasked : mask * unmasked;
  }
  DCN_INLINE T dweight_dy(int corner) const {
    return y.dweight[corner >> 1] * x.weight[corner & 1];
  }
  DCN_INLINE T dweight_dx(int corner) const {
    return y.weight[corner >> 1] * x.dweight[corner & 1];
  }
  // The value of a tap that reads no pixel: 0, or NaN.
  DCN_INLINE T value_outside() const {
    return state == TapState::kNan ? mask : T(0) * mask;
  }
};

// Tap (kernel_y, kernel_x) of output position (out_y, out_x), displaced by
// (dy, dx).
template <typename T>
DCN_INLINE DeformTap<T> locate_tap(
    const ConvGeometry& g,
    int out_y,
    int out_x,
    int kernel_y,
    int kernel_x,
    T dy,
    T dx,
    T mask) {
  const int64_t base_y = static_cast<int64_t>(out_y) * g.stride_h - g.pad_h +
      static_cast<int64_t>(kernel_y) * g.dilation_h;
  const int64_t base_x = static_cast<int64_t>(out_x) * g.stride_w - g.pad_w +
      static_cast<int64_t>(kernel_x) * g.dilation_w;
  const T y = static_cast<T>(base_y) + dy;
  const T x = static_cast<T>(base_x) + dx;
  DeformTap<T> tap{};
  tap.mask = mask;
  if (has_weight_at(y, g.in_h) && has_weight_at(x, g.in_w) && mask == mask) {
    tap.state = TapState::kInside;
    tap.y = linear_weights(y, g.in_h);
    tap.x = linear_weights(x, g.in_w);
  } else if (y == y && x == x && mask == mask) {
    tap.state = TapState::kOutside;
  } else {
    tap.state = TapState::kNan;
    tap.mask = y + x + mask; // one of them is NaN, so the sum is
  }
  return tap;
}

// Gradients of (dy, dx, mask), Eq. 7. corner_sums[k] is the sum over channels
// of grad_column * pixel of corner k.
template <typename T>
DCN_INLINE void tap_gradients(
    const DeformTap<T>& tap,
    const T (&corner_sums)[4],
    T* gradient) {
  const T start = tap.state == TapState::kNan ? tap.mask : T(0);
  gradient[0] = gradient[1] = gradient[2] = start;
  if (tap.state != TapState::kInside) {
    return;
  }
  for (int k = 0; k < 4; ++k) {
    gradient[0] += tap.mask * tap.dweight_dy(k) * corner_sums[k];
    gradient[1] += tap.mask * tap.dweight_dx(k) * corner_sums[k];
    gradient[2] += tap.weight(k) * corner_sums[k];
  }
}

} // namespace dcn
