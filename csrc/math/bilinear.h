// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Bilinear interpolation weights and their derivatives, along one axis.

#pragma once

#include "math/macros.h"

namespace dcn {

// The kernel g of Eq. 4 at a fractional position; its product over both axes is
// G of Eq. 3. Pixels outside the map count as zero: they get weight and
// derivative 0, and the index of their neighbour, so that reading them is safe.
template <typename T>
struct LinearWeights {
  int pixel[2]; // the two pixels around the position, inside the map
  T weight[2]; // g(pixel, position)
  T dweight[2]; // dg / d position, from the right at integer positions
};

// 1 if a pixel of an axis of `size` pixels can have a weight at `position`,
// else 0; also for NaN and infinities, so that only positions that fit an int
// are converted to int.
template <typename T>
DCN_INLINE T has_weight_at(T position, int size) {
  const T above = position > T(-1) ? T(1) : T(0);
  return position < static_cast<T>(size) ? above : T(0);
}

// Requires has_weight_at(position, size), or position -1.
template <typename T>
DCN_INLINE LinearWeights<T> linear_weights(T position, int size) {
  // floor(position) by truncation of the positive position + 1: no function
  // call.
  const int low = static_cast<int>(position + T(1)) - 1;
  // position + 1 may have been rounded up to the next integer.
  const int floor = static_cast<T>(low) > position ? low - 1 : low;
  const T fraction = position - static_cast<T>(floor);
  const T rest = T(1) - fraction;
  const bool has_low = floor >= 0;
  const bool has_high = floor + 1 < size;
  LinearWeights<T> weights;
  weights.pixel[0] = has_low ? floor : 0;
  weights.pixel[1] = has_high ? floor + 1 : size - 1;
  weights.weight[0] = has_low ? rest : T(0);
  weights.weight[1] = has_high ? fraction : T(0);
  weights.dweight[0] = has_low ? T(-1) : T(0);
  weights.dweight[1] = has_high ? T(1) : T(0);
  return weights;
}

} // namespace dcn
