// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Copies between memory formats and dtypes.
#pragma once

#include <type_traits>

#include "cpu/transpose.h"
#include "ops/any_dtype_view.h"
#include "ops/feature_map_view.h"

namespace dcn::cpu {

// View of a channels-last buffer with rows of `width` pixels.
template <typename T>
FeatureMapView<T> channels_last_view(T* data, int64_t width, int64_t channels) {
  return {data, 1, width * channels, channels};
}

// Copies the channels of a pixel.
template <bool kAdd, typename From, typename To>
DCN_INLINE void copy_pixel(
    const From* from,
    int64_t from_stride,
    To* to,
    int64_t to_stride,
    int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) {
    To& value = to[c * to_stride];
    const To converted = static_cast<To>(from[c * from_stride]);
    value = kAdd ? static_cast<To>(value + converted) : converted;
  }
}

// Copies rows [begin_row, end_row) of `channels` channels; with kAdd, adds
// them.
template <typename From, typename To, bool kAdd = false>
void copy_rows(
    const FeatureMapView<From>& from,
    const FeatureMapView<To>& to,
    int64_t begin_row,
    int64_t end_row,
    int64_t width,
    int64_t channels) {
  using Source = std::remove_const_t<From>;
  using T = OpMathType<Source>;
  // One side is often contiguous along channels, the other along pixels.
  const bool to_channels_last =
      from.column_stride == 1 && to.channel_stride == 1;
  const bool from_channels_last =
      from.channel_stride == 1 && to.column_stride == 1;
  // Otherwise blocks of channels keep the cache lines of both in cache.
  constexpr int64_t kChannels = 16;
  const T* const no_bias = nullptr;
  for (int64_t y = begin_row; y < end_row; ++y) {
    if (to_channels_last || from_channels_last) {
      transpose<Source, To, kAdd, T>(
          from.pixel(y, 0),
          to_channels_last ? from.channel_stride : from.column_stride,
          to_channels_last ? channels : width,
          to_channels_last ? width : channels,
          no_bias,
          to.pixel(y, 0),
          to_channels_last ? to.column_stride : to.channel_stride);
      continue;
    }
    if (from.channel_stride == 1 && to.channel_stride == 1) {
      for (int64_t x = 0; x < width; ++x) {
        copy_pixel<kAdd>(from.pixel(y, x), 1, to.pixel(y, x), 1, channels);
      }
      continue;
    }
    for (int64_t first = 0; first < channels; first += kChannels) {
      const int64_t last =
          first + kChannels < channels ? first + kChannels : channels;
      for (int64_t x = 0; x < width; ++x) {
        copy_pixel<kAdd>(
            from.pixel(y, x) + first * from.channel_stride,
            from.channel_stride,
            to.pixel(y, x) + first * to.channel_stride,
            to.channel_stride,
            last - first);
      }
    }
  }
}

} // namespace dcn::cpu
