// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Thread groups: 1, 2, 4, ... 32 neighbouring threads of a warp that work on
// one item (a tap of an output position, or a bin of a RoI) and divide its
// channels among them.
#pragma once

#include <cstdint>

#include "cuda/launch.cuh"
#include "ops/feature_map_view.h"

namespace dcn::cuda {

constexpr int kWarp = 32;

// The grid-stride loop of a thread group over items. All threads of a warp take
// the same number of steps, so that they may use warp shuffles.
struct ThreadGroupLoop {
  int64_t first;
  int64_t step;
  int lane; // of the thread in its group

  __device__ explicit ThreadGroupLoop(int group_size) {
    // The number of threads of a launch fits 32 bits.
    const unsigned warp = (blockIdx.x * blockDim.x + threadIdx.x) / kWarp;
    const unsigned warps = gridDim.x * blockDim.x / kWarp;
    first = warp * (kWarp / group_size);
    step = warps * (kWarp / group_size);
    lane = threadIdx.x % group_size;
  }
  // The item of this thread's group in the step that starts at `start`.
  __device__ int64_t item(int64_t start, int group_size) const {
    return start + threadIdx.x % kWarp / group_size;
  }
};

// The smallest group whose threads, at `vector_size` channels each, cover all
// channels; at most a warp.
inline int group_size_for(int64_t channels, int64_t vector_size) {
  int group_size = 1;
  while (group_size < kWarp && group_size * vector_size < channels) {
    group_size *= 2;
  }
  return group_size;
}

// Whether `view` can be accessed `vector_size` channels at a time.
template <typename S>
bool is_aligned(
    const FeatureMapView<S>& view,
    int64_t image_stride,
    int64_t vector_size) {
  const auto address = reinterpret_cast<std::uintptr_t>(view.data);
  return view.channel_stride == 1 && address % 16 == 0 &&
      view.row_stride % vector_size == 0 &&
      view.column_stride % vector_size == 0 && image_stride % vector_size == 0;
}

} // namespace dcn::cuda
