// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// The pixels of one bin, all its channels at once.
#pragma once

#include "cpu/roi/separable_weights.h"
#include "ops/feature_map_view.h"

namespace dcn::cpu {

// sums = weighted sum over the bin's pixels.
template <typename S, typename T>
void pool_vectorized(
    const FeatureMapView<const S>& map,
    const SeparableWeights<T>& y,
    const SeparableWeights<T>& x,
    int64_t channels,
    T* sums);

// Derivative of sum(gradient * sums) by the bin's position along y and x.
template <typename T>
struct OffsetGrad {
  T y;
  T x;
};

// Adds gradient * weight to `input`, unless its data is null.
template <typename S, typename T>
OffsetGrad<T> backward_vectorized(
    const FeatureMapView<const S>& map,
    const SeparableWeights<T>& y,
    const SeparableWeights<T>& x,
    int64_t channels,
    const T* gradient,
    bool wants_offset,
    const FeatureMapView<T>& input);

} // namespace dcn::cpu
