// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include "ops/feature_map_view.h"

namespace dcn::cpu {

// A channels-last buffer of `channels` channels and rows of `width` pixels.
template <typename T>
FeatureMapView<T> channels_last_view(T* data, int64_t width, int64_t channels) {
  return {data, 1, width * channels, channels};
}

// Copies rows [begin_row, end_row) of `channels` channels from one layout and
// dtype to another; kAdd accumulates.
template <typename From, typename To, bool kAdd = false>
void copy_rows(
    const FeatureMapView<From>& from,
    const FeatureMapView<To>& to,
    int64_t begin_row,
    int64_t end_row,
    int64_t width,
    int64_t channels) {
  // One side runs along channels, the other often along pixels: tiles of a
  // cache line's length keep both sides in cache.
  constexpr int64_t kTile = 16;
  for (int64_t y = begin_row; y < end_row; ++y) {
    for (int64_t first = 0; first < channels; first += kTile) {
      const int64_t last = first + kTile < channels ? first + kTile : channels;
      for (int64_t x = 0; x < width; ++x) {
        const From* source = from.pixel(y, x);
        To* target = to.pixel(y, x);
        for (int64_t c = first; c < last; ++c) {
          To& value = target[c * to.channel_stride];
          const To copied = static_cast<To>(source[c * from.channel_stride]);
          value = kAdd ? static_cast<To>(value + copied) : copied;
        }
      }
    }
  }
}

} // namespace dcn::cpu
