// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// How threads are dealt to the taps of a chunk: groups of `lanes` neighbouring
// threads share a tap and divide its channels, kSize at a time.
#pragma once

#include <cstdint>

#include "cuda/conv/deform_im2col.cuh"
#include "cuda/launch.cuh"
#include "cuda/vectorized_access.cuh"

namespace dcn::cuda {

constexpr int kWarp = 32;

// One tap of one row.
template <typename S, typename T>
struct TapIndex {
  int64_t image; // in the batch
  int64_t map_image;
  int y; // of the output
  int x;
  int tap;
  S* column;

  __device__ TapIndex(const Im2colTile<S, T>& tile, int64_t index) {
    // A chunk's columns fit a cache, so its units fit 32 bits, and so do its
    // positions beside those of a line. Division of 64 bits is slow.
    const auto& geometry = tile.taps.geometry;
    const unsigned taps = geometry.taps();
    const unsigned row = static_cast<unsigned>(index) / taps;
    const unsigned positions = tile.positions;
    const unsigned of_image = row / positions;
    const unsigned along = tile.first_x + row % positions;
    tap = static_cast<unsigned>(index) % taps;
    image = tile.image + of_image;
    map_image = tile.map_image + of_image;
    y = tile.first_y + along / geometry.out_w;
    x = along % geometry.out_w;
    column = tile.columns + row * tile.row_stride + tap * tile.tap_stride;
  }

  __device__ DeformTap<T> locate(const Im2colTile<S, T>& tile) const {
    const int kernel_w = tile.taps.geometry.kernel_w;
    return tile.taps.template locate<T>(
        image, tile.offset_group, y, x, tap / kernel_w, tap % kernel_w);
  }
};

// The loop of a thread over units: all threads of a warp take the same number
// of steps, so that they can exchange values.
struct ThreadGroupLoop {
  int64_t first;
  int64_t step;
  int lane;

  __device__ explicit ThreadGroupLoop(int group_size) {
    // The threads of a launch fit 32 bits.
    const unsigned warp = (blockIdx.x * blockDim.x + threadIdx.x) / kWarp;
    const unsigned warps = gridDim.x * blockDim.x / kWarp;
    first = warp * (kWarp / group_size);
    step = warps * (kWarp / group_size);
    lane = threadIdx.x % group_size;
  }
  // The thread's own unit in the step that starts at `start`.
  __device__ int64_t index(int64_t start, int group_size) const {
    return start + threadIdx.x % kWarp / group_size;
  }
};

// Whether `view` can be accessed by `size` channels at a time.
template <typename S>
bool is_aligned(
    const FeatureMapView<S>& view,
    int64_t image_stride,
    int64_t size) {
  const auto address = reinterpret_cast<std::uintptr_t>(view.data);
  return view.channel_stride == 1 && address % 16 == 0 &&
      view.row_stride % size == 0 && view.column_stride % size == 0 &&
      image_stride % size == 0;
}

template <typename S, typename T>
bool can_vectorize(const Im2colTile<S, T>& tile) {
  constexpr int64_t size = kVectorSize<S>;
  return tile.channels % size == 0 &&
      is_aligned(tile.map, tile.map_stride, size) &&
      is_aligned(
             FeatureMapView<S>{
                 tile.columns, 1, tile.row_stride, tile.tap_stride},
             size,
             size);
}

// The power of two of threads that divides a tap's channels best.
inline int group_size_for(int64_t channels, int64_t size) {
  int group_size = 1;
  while (group_size < kWarp && group_size * size < channels) {
    group_size *= 2;
  }
  return group_size;
}

} // namespace dcn::cuda
