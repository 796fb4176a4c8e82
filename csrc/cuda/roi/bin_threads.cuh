// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// How threads are dealt to the bins of a chunk of RoIs: groups of `lanes`
// neighbouring threads share a bin and divide its channels, kSize at a time.
#pragma once

#include <algorithm>

#include "cuda/conv/tap_threads.cuh"
#include "cuda/roi/roi_bins.cuh"

namespace dcn {

// One bin of one class of one RoI, and its channels in the slice. The classes
// of a bin follow one another, since their channels are neighbours.
template <typename T>
struct BinUnit {
  int64_t roi; // of the chunk
  int64_t of_class;
  int i;
  int j;
  int64_t begin; // output channels
  int64_t end;

  template <typename S>
  __device__ BinUnit(const RoiChunk<S, T>& chunk, int64_t index) {
    const auto& shape = chunk.source.shape;
    of_class = index % shape.classes;
    const int64_t bin = index / shape.classes;
    j = bin % shape.bins.w;
    i = bin / shape.bins.w % shape.bins.h;
    roi = bin / shape.bins.w / shape.bins.h;
    const int64_t per_class = shape.channels_per_class();
    const int64_t stop = chunk.first_channel + chunk.channels;
    begin = max(of_class * per_class, chunk.first_channel);
    end = min((of_class + 1) * per_class, stop);
  }

  // Its place among the slopes, (rois, classes, bins).
  __device__ int64_t slope(const RoiPoolShape& shape) const {
    const int64_t row = roi * shape.classes + of_class;
    return (row * shape.bins.h + i) * shape.bins.w + j;
  }
};

template <typename S, typename T>
DCN_INLINE int64_t bin_units(const RoiChunk<S, T>& chunk) {
  const auto& shape = chunk.source.shape;
  return chunk.rois * shape.classes * shape.bins.count();
}

// kSize channels of the gradient of bin (i, j), as type T.
template <int kSize, typename S, typename T>
__device__ __forceinline__ void load_pooled(
    const RoiChunk<S, T>& chunk,
    const S* from,
    T (&to)[kSize]) {
  if (chunk.pooled_wide) {
    load_values(from, to);
    return;
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    to[i] = static_cast<T>(from[i * chunk.pooled.channel_stride]);
  }
}

template <int kSize, typename S, typename T>
__device__ __forceinline__ void store_pooled(
    const RoiChunk<S, T>& chunk,
    S* to,
    const T (&from)[kSize]) {
  if (chunk.pooled_wide) {
    store_values(to, from);
    return;
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    to[i * chunk.pooled.channel_stride] = static_cast<S>(from[i]);
  }
}

// Whether the channels of every class in the slice divide into runs of `size`.
template <typename S, typename T>
bool has_runs(const RoiChunk<S, T>& chunk, int64_t size) {
  return chunk.source.shape.channels_per_class() % size == 0 &&
      chunk.first_channel % size == 0 && chunk.channels % size == 0;
}

template <typename S>
bool is_aligned(const GroupedMaps<S>& maps, int64_t size) {
  return is_aligned(maps.map, maps.image_stride, size) &&
      maps.group_stride % size == 0;
}

// Deals threads for kernels that work on `size` channels at a time.
template <typename S, typename T>
void deal(RoiChunk<S, T>& chunk, int64_t size) {
  chunk.lanes = lanes_for(
      std::min(chunk.source.shape.channels_per_class(), chunk.channels), size);
  chunk.pooled_wide = is_aligned(chunk.pooled, chunk.pooled_stride, size);
}

} // namespace dcn
