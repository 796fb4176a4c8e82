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
// Corner k is row k >> 1, column k & 1. Corners and weights are valid only
// inside the map.
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
    const T masked = mask * unmasked;
    return unmasked == T(0) ? unmasked : masked;
  }
  DCN_INLINE T dweight_dy(int corner) const {
    return y.dweight[corner >> 1] * x.weight[corner & 1];
  }
  DCN_INLINE T dweight_dx(int corner) const {
    return y.weight[corner >> 1] * x.dweight[corner & 1];
  }
  // The value of a tap that reads no pixel: 0, or NaN if `mask` is not finite.
  DCN_INLINE T value_outside() const {
    return T(0) * mask;
  }
};

// 1, or 0 for NaN.
template <typename T>
DCN_INLINE T is_number(T value) {
  return value == value ? T(1) : T(0);
}

// The tap at (y, x) of a map of in_h x in_w pixels. Without branches, so that
// loops over it are vectorized.
template <typename T>
DCN_INLINE DeformTap<T> locate_tap(T y, T x, T mask, int in_h, int in_w) {
  // Conditions as numbers: compilers do not vectorize combined booleans.
  const T numbers =
      is_number(y) * is_number(x) * is_number(mask); // 0 if one is NaN
  const T inside = has_weight_at(y, in_h) * has_weight_at(x, in_w) * numbers;
  DeformTap<T> tap;
  tap.state = inside != T(0) ? TapState::kInside
      : numbers != T(0)      ? TapState::kOutside
                             : TapState::kNan;
  const T nan = y + x + mask; // if one of them is
  tap.mask = numbers != T(0) ? mask : nan;
  tap.y = linear_weights(inside != T(0) ? y : T(0), in_h);
  tap.x = linear_weights(inside != T(0) ? x : T(0), in_w);
  return tap;
}

// Where tap `kernel` of output position `out` lies along an axis on the regular
// grid, without offset.
DCN_INLINE int64_t
grid_position(int out, int stride, int pad, int kernel, int dilation) {
  return static_cast<int64_t>(out) * stride - pad +
      static_cast<int64_t>(kernel) * dilation;
}

// Gradients of (dy, dx, mask), Eq. 7. corner_sums[k] is the sum over channels
// of grad_column * pixel of corner k; it does not count outside the map.
template <typename T>
DCN_INLINE void tap_gradients(
    const DeformTap<T>& tap,
    const T (&corner_sums)[4],
    T* gradient) {
  T dy = 0, dx = 0, mask = 0;
  for (int k = 0; k < 4; ++k) {
    dy += tap.mask * tap.dweight_dy(k) * corner_sums[k];
    dx += tap.mask * tap.dweight_dx(k) * corner_sums[k];
    mask += tap.weight(k) * corner_sums[k];
  }
  const T outside = tap.state == TapState::kNan ? tap.mask : T(0);
  gradient[0] = tap.state == TapState::kInside ? dy : outside;
  gradient[1] = tap.state == TapState::kInside ? dx : outside;
  gradient[2] = tap.state == TapState::kInside ? mask : outside;
}

} // namespace dcn
