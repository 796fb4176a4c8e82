// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// The items of the RoI pooling kernels: a thread group works on one bin of one
// class of a RoI.
#pragma once

#include <algorithm>

#include "cuda/roi/roi_bins.cuh"
#include "cuda/thread_groups.cuh"
#include "cuda/vectorized_access.cuh"

namespace dcn::cuda {

// One bin of one class of one RoI, and its channels in the slice. Classes vary
// fastest, since their channels are contiguous.
template <typename T>
struct ClassBin {
  int64_t roi; // in the tile
  int64_t class_index;
  int i;
  int j;
  int64_t begin; // output channels
  int64_t end;

  template <typename S>
  __device__ ClassBin(const RoiTile<S, T>& tile, int64_t index) {
    const auto& shape = tile.geometry.shape;
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

  template <typename S>
  __device__ RoiBin<T> locate(const RoiTile<S, T>& tile) const {
    return tile.geometry.template locate<T>(
        tile.first_roi + roi, class_index, i, j);
  }

  // Index into offset_grads, (rois, classes, bins).
  __device__ int64_t offset_grad_index(const RoiPoolShape& shape) const {
    const int64_t row = roi * shape.classes + class_index;
    return (row * shape.bins.h + i) * shape.bins.w + j;
  }
};

// The divisor of a bin's sum; 0 if the bin has no samples.
template <typename T>
__device__ T divisor_of(const RoiBin<T>& bin) {
  return bin.state == RoiState::kInside
      ? bin_divisor(bin.y, bin.x, count_kept(bin.y), count_kept(bin.x))
      : T(0);
}

template <typename S, typename T>
DCN_INLINE int64_t num_bins(const RoiTile<S, T>& tile) {
  const auto& shape = tile.geometry.shape;
  return tile.rois * shape.classes * shape.bins.count();
}

// The first of `bins` bins that belongs to part (or group) `part` of `parts`.
__device__ inline int first_bin(int part, int parts, int bins) {
  return (int64_t{part} * bins + parts - 1) / parts;
}

// Loads kSize channels of the gradient of a bin, converted to T.
template <int kSize, typename S, typename T>
__device__ __forceinline__ void load_pooled(
    const RoiTile<S, T>& tile,
    const S* from,
    T (&to)[kSize]) {
  if (tile.vectorized_pooled) {
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
  if (tile.vectorized_pooled) {
    store_values(to, from);
    return;
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    to[i * tile.pooled.channel_stride] = static_cast<S>(from[i]);
  }
}

// Whether the channels of every class in the slice are divisible by `size`.
template <typename S, typename T>
bool divides_channels(const RoiTile<S, T>& tile, int64_t size) {
  return tile.geometry.shape.channels_per_class() % size == 0 &&
      tile.first_channel % size == 0 && tile.channels % size == 0;
}

template <typename S>
bool is_aligned(const GroupedMaps<S>& maps, int64_t size) {
  return is_aligned(maps.map, maps.image_stride, size) &&
      maps.group_stride % size == 0;
}

// Sets the thread groups of a kernel that accesses `size` channels at a time.
template <typename S, typename T>
void assign_threads(RoiTile<S, T>& tile, int64_t size) {
  tile.group_size = group_size_for(
      std::min(tile.geometry.shape.channels_per_class(), tile.channels), size);
  tile.vectorized_pooled = is_aligned(tile.pooled, tile.pooled_stride, size);
}

} // namespace dcn::cuda
