// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// How threads are dealt to the bins of a chunk of RoIs: groups of `lanes`
// neighbouring threads share a bin and divide its channels, kSize at a time.
#pragma once

#include <algorithm>

#include "cuda/conv/tap_threads.cuh"
#include "cuda/roi/roi_bins.cuh"

namespace dcn::cuda {

// One bin of one class of one RoI, and its channels in the slice. The classes
// of a bin follow one another, since their channels are neighbours.
template <typename T>
struct ClassBin {
  int64_t roi; // of the chunk
  int64_t class_index;
  int i;
  int j;
  int64_t begin; // output channels
  int64_t end;

  template <typename S>
  __device__ ClassBin(const RoiTile<S, T>& tile, int64_t index) {
    const auto& shape = tile.source.shape;
    class_index = index % shape.classes;
    const int64_t bin = index / shape.classes;
    j = bin % shape.bins.w;
    i = bin / shape.bins.w % shape.bins.h;
    roi = bin / shape.bins.w / shape.bins.h;
    const int64_t per_class = shape.channels_per_class();
    const int64_t stop = tile.first_channel + tile.channels;
    begin = max(class_index * per_class, tile.first_channel);
    end = min((class_index + 1) * per_class, stop);
  }

  // Its place among the slopes, (rois, classes, bins).
  __device__ int64_t dweight(const RoiPoolShape& shape) const {
    const int64_t row = roi * shape.classes + class_index;
    return (row * shape.bins.h + i) * shape.bins.w + j;
  }
};

template <typename S, typename T>
DCN_INLINE int64_t num_bins(const RoiTile<S, T>& tile) {
  const auto& shape = tile.source.shape;
  return tile.rois * shape.classes * shape.bins.count();
}

// kSize channels of the gradient of bin (i, j), as type T.
template <int kSize, typename S, typename T>
__device__ __forceinline__ void load_pooled(
    const RoiTile<S, T>& tile,
    const S* from,
    T (&to)[kSize]) {
  if (tile.pooled_wide) {
    load_values(from, to);
    return;
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    to[i] = static_cast<T>(from[i * tile.pooled.channel_stride]);
  }
}

template <int kSize, typename S, typename T>
__device__ __forceinline__ void store_pooled(
    const RoiTile<S, T>& tile,
    S* to,
    const T (&from)[kSize]) {
  if (tile.pooled_wide) {
    store_values(to, from);
    return;
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    to[i * tile.pooled.channel_stride] = static_cast<S>(from[i]);
  }
}

// Whether the channels of every class in the slice divide into runs of `size`.
template <typename S, typename T>
bool divides_channels(const RoiTile<S, T>& tile, int64_t size) {
  return tile.source.shape.channels_per_class() % size == 0 &&
      tile.first_channel % size == 0 && tile.channels % size == 0;
}

template <typename S>
bool is_aligned(const GroupedMaps<S>& maps, int64_t size) {
  return is_aligned(maps.map, maps.image_stride, size) &&
      maps.group_stride % size == 0;
}

// Deals threads for kernels that work on `size` channels at a time.
template <typename S, typename T>
void assign_threads(RoiTile<S, T>& tile, int64_t size) {
  tile.group_size = group_size_for(
      std::min(tile.source.shape.channels_per_class(), tile.channels), size);
  tile.pooled_wide = is_aligned(tile.pooled, tile.pooled_stride, size);
}

} // namespace dcn::cuda
