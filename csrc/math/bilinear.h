// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include "math/macros.h"

namespace dcn {

// One axis of bilinear interpolation: the kernel g of Eq. 4 at a fractional
// position, whose product over both axes is G of Eq. 3. Pixels outside the map
// count as zero: they keep a readable index, that of their neighbour, and get
// weight and slope 0.
template <typename T>
struct LinearWeights {
  int at[2]; // the two pixels around the position, inside the map
  T weight[2]; // g(at, position)
  T dweight[2]; // dg / d position, from the right at integer positions
};

// Whether a pixel of an axis of `size` pixels can have a weight at `position`.
// False for NaN and for both infinities, so that only positions which fit an
// integer are ever converted to one.
template <typename T>
DCN_INLINE bool has_weight_at(T position, int size) {
  return position > T(-1) && position < static_cast<T>(size);
}

// Requires reaches_axis(position, size), or position -1.
template <typename T>
DCN_INLINE LinearWeights<T> linear_weights(T position, int size) {
  // Truncation of position + 1 > 0 is floor(position) + 1, without a call.
  const int low = static_cast<int>(position + T(1)) - 1;
  // The sum may have been rounded up to the next integer.
  const int floor = static_cast<T>(low) > position ? low - 1 : low;
  const T fraction = position - static_cast<T>(floor);
  const bool has_low = floor >= 0;
  const bool has_high = floor + 1 < size;
  LinearWeights<T> tap;
  tap.at[0] = has_low ? floor : 0;
  tap.at[1] = has_high ? floor + 1 : size - 1;
  tap.weight[0] = has_low ? T(1) - fraction : T(0);
  tap.weight[1] = has_high ? fraction : T(0);
  tap.dweight[0] = has_low ? T(-1) : T(0);
  tap.dweight[1] = has_high ? T(1) : T(0);
  return tap;
}

} // namespace dcn
