// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// The items of the convolution kernels: a thread group works on one tap of one
// output position.
#pragma once

#include "cuda/conv/deform_im2col.cuh"
#include "cuda/thread_groups.cuh"
#include "cuda/vectorized_access.cuh"

namespace dcn::cuda {

template <typename S, typename T>
struct TapIndex {
  int64_t image; // in the batch
  int64_t map_image; // in `map` and in the gradients
  int y; // of the output
  int x;
  int tap;
  S* column;

  __device__ TapIndex(const Im2colTile<S, T>& tile, int64_t index) {
    // The columns of a tile fit in the L2 cache, so its taps and positions fit
    // 32 bits. 64-bit divisions are slow.
    const auto& geometry = tile.offsets.geometry;
    const unsigned taps = geometry.taps();
    const unsigned row = static_cast<unsigned>(index) / taps;
    const unsigned positions = tile.positions;
    const unsigned tile_image = row / positions;
    const unsigned position = tile.first_x + row % positions;
    tap = static_cast<unsigned>(index) % taps;
    image = tile.image + tile_image;
    map_image = tile.map_image + tile_image;
    y = tile.first_y + position / geometry.out_w;
    x = position % geometry.out_w;
    column = tile.columns + row * tile.row_stride + tap * tile.tap_stride;
  }

  __device__ DeformTap<T> locate(const Im2colTile<S, T>& tile) const {
    const int kernel_w = tile.offsets.geometry.kernel_w;
    return tile.offsets.template locate<T>(
        image, tile.offset_group, y, x, tap / kernel_w, tap % kernel_w);
  }
};

// Whether input and columns can be accessed kVectorSize<S> channels at a time.
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

} // namespace dcn::cuda
