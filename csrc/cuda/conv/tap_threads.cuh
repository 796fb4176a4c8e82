// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// How threads are dealt to the taps of a chunk: groups of `lanes` neighbouring
// threads share a tap and divide its channels, kSize at a time.
#pragma once

#include <cstdint>

#include "cuda/conv/deform_im2col.cuh"
#include "cuda/launch.cuh"
#include "cuda/vectorized_access.cuh"

namespace dcn {

constexpr int kWarp = 32;

// One tap of one row.
template <typename S, typename T>
struct Unit {
  int64_t image; // in the batch
  int64_t map_image;
  int y; // of the output
  int x;
  int tap;
  S* column;

  __device__ Unit(const ColumnChunk<S, T>& chunk, int64_t index) {
    // A chunk's columns fit a cache, so its units fit 32 bits, and so do its
    // positions beside those of a line. Division of 64 bits is slow.
    const auto& geometry = chunk.taps.geometry;
    const unsigned taps = geometry.taps();
    const unsigned row = static_cast<unsigned>(index) / taps;
    const unsigned positions = chunk.positions;
    const unsigned of_image = row / positions;
    const unsigned along = chunk.first_x + row % positions;
    tap = static_cast<unsigned>(index) % taps;
    image = chunk.image + of_image;
    map_image = chunk.map_image + of_image;
    y = chunk.first_y + along / geometry.out_w;
    x = along % geometry.out_w;
    column = chunk.columns + row * chunk.row_stride + tap * chunk.tap_stride;
  }

  __device__ DeformTap<T> locate(const ColumnChunk<S, T>& chunk) const {
    const int kernel_w = chunk.taps.geometry.kernel_w;
    return chunk.taps.template locate<T>(
        image, chunk.offset_group, y, x, tap / kernel_w, tap % kernel_w);
  }
};

// The loop of a thread over units: all threads of a warp take the same number
// of steps, so that they can exchange values.
struct UnitLoop {
  int64_t first;
  int64_t step;
  int lane;

  __device__ explicit UnitLoop(int lanes) {
    // The threads of a launch fit 32 bits.
    const unsigned warp = (blockIdx.x * blockDim.x + threadIdx.x) / kWarp;
    const unsigned warps = gridDim.x * blockDim.x / kWarp;
    first = warp * (kWarp / lanes);
    step = warps * (kWarp / lanes);
    lane = threadIdx.x % lanes;
  }
  // The thread's own unit in the step that starts at `start`.
  __device__ int64_t own(int64_t start, int lanes) const {
    return start + threadIdx.x % kWarp / lanes;
  }
};

// Whether `view` can be accessed by `size` channels at a time.
template <typename S>
bool is_aligned(const MapView<S>& view, int64_t image_stride, int64_t size) {
  const auto address = reinterpret_cast<std::uintptr_t>(view.data);
  return view.channel_stride == 1 && address % 16 == 0 &&
      view.row_stride % size == 0 && view.column_stride % size == 0 &&
      image_stride % size == 0;
}

template <typename S, typename T>
bool is_vectorisable(const ColumnChunk<S, T>& chunk) {
  constexpr int64_t size = kVectorSize<S>;
  return chunk.channels % size == 0 &&
      is_aligned(chunk.map, chunk.map_stride, size) &&
      is_aligned(
             MapView<S>{chunk.columns, 1, chunk.row_stride, chunk.tap_stride},
             size,
             size);
}

// The power of two of threads that divides a tap's channels best.
inline int lanes_for(int64_t channels, int64_t size) {
  int lanes = 1;
  while (lanes < kWarp && lanes * size < channels) {
    lanes *= 2;
  }
  return lanes;
}

} // namespace dcn
