// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Deterministic col2im, used under torch.use_deterministic_algorithms: the
// corners of all taps of a tile are sorted by the pixel that they read, then
// the contributions to each pixel are summed in that order.

#include <limits>

#include <ATen/ops/empty.h>
#include <ATen/ops/sort.h>

#include "cuda/conv/deform_im2col.cuh"
#include "cuda/conv/tap_threads.cuh"

namespace dcn::cuda {
namespace {

// The key of a corner without weight, sorted behind all pixels.
constexpr int64_t kNoPixel = std::numeric_limits<int64_t>::max();

template <typename S, typename T>
struct KeyParams {
  Im2colTile<S, T> tile;
  int64_t* keys; // (taps of the tile, 4)
};

template <typename S, typename T>
__global__ void key_kernel(KeyParams<S, T> params) {
  const auto& tile = params.tile;
  const auto& geometry = tile.offsets.geometry;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
       index < tile.num_taps();
       index += step) {
    const TapIndex<S, T> tap_index(tile, index);
    const DeformTap<T> tap = tap_index.locate(tile);
    for (int k = 0; k < 4; ++k) {
      const bool has_weight =
          tap.state == TapState::kInside && tap.masked_weight(k) != T(0);
      const int64_t row =
          tap_index.map_image * geometry.in_h + tap.y.pixel[k >> 1];
      params.keys[4 * index + k] =
          has_weight ? row * geometry.in_w + tap.x.pixel[k & 1] : kNoPixel;
    }
  }
}

template <typename S, typename T>
struct SumParams {
  Im2colTile<S, T> tile;
  FeatureMapView<T> input;
  int64_t input_stride;
  const int64_t* keys; // sorted
  const int64_t* corners; // 4 * tap index + corner, in the order of the keys
  int64_t count;
};

// Sums the contributions with the same key as the one at `first`, and adds them
// to kSize channels of its pixel, from `c` on.
template <int kSize, typename S, typename T>
__device__ __forceinline__ void sum_pixel(
    const SumParams<S, T>& params,
    int64_t first,
    int64_t c) {
  const auto& tile = params.tile;
  const auto& geometry = tile.offsets.geometry;
  const int64_t key = params.keys[first];
  T sums[kSize] = {};
  for (int64_t i = first; i < params.count && params.keys[i] == key; ++i) {
    const int64_t corner = params.corners[i];
    const TapIndex<S, T> tap_index(tile, corner / 4);
    const DeformTap<T> tap = tap_index.locate(tile);
    T weight = T(0);
#pragma unroll
    for (int k = 0; k < 4; ++k) { // registers cannot be indexed at run time
      weight = k == corner % 4 ? tap.masked_weight(k) : weight;
    }
    T gradient[kSize];
    load_values(tap_index.column + c, gradient);
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      sums[k] += weight * gradient[k];
    }
  }
  const int64_t row = key / geometry.in_w;
  T* pixel = params.input.pixel(row % geometry.in_h, key % geometry.in_w) +
      row / geometry.in_h * params.input_stride;
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    pixel[(c + k) * params.input.channel_stride] += sums[k];
  }
}

template <typename S, typename T, int kSize>
__global__ void sum_kernel(SumParams<S, T> params) {
  const int group_size = params.tile.group_size;
  const ThreadGroupLoop loop(group_size);
  for (int64_t start = loop.first; start < params.count; start += loop.step) {
    const int64_t i = loop.item(start, group_size);
    if (i >= params.count || params.keys[i] == kNoPixel ||
        (i > 0 && params.keys[i - 1] == params.keys[i])) {
      continue; // not the first contribution to a pixel
    }
    for (int64_t c = loop.lane * kSize; c < params.tile.channels;
         c += group_size * kSize) {
      sum_pixel<kSize>(params, i, c);
    }
  }
}

} // namespace

template <typename S, typename T>
void col2im_deterministic(
    Im2colTile<S, T> tile,
    const Im2colGradients<T>& gradients,
    const at::TensorOptions& options) {
  const at::Tensor keys =
      at::empty({4 * tile.num_taps()}, options.dtype(at::kLong));
  launch(
      key_kernel<S, T>,
      KeyParams<S, T>{tile, keys.data_ptr<int64_t>()},
      tile.num_taps());
  const auto [sorted, corners] =
      at::sort(keys, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  constexpr int kWide = kVectorSize<S>;
  const bool wide = can_vectorize(tile);
  tile.group_size = group_size_for(tile.channels, wide ? kWide : 1);
  launch(
      wide ? sum_kernel<S, T, kWide> : sum_kernel<S, T, 1>,
      SumParams<S, T>{
          tile,
          gradients.input,
          gradients.input_stride,
          sorted.template data_ptr<int64_t>(),
          corners.template data_ptr<int64_t>(),
          keys.numel()},
      keys.numel() * tile.group_size);
}

#define DCN_INSTANTIATE_COL2IM(S, T)  \
  template void col2im_deterministic( \
      Im2colTile<S, T>, const Im2colGradients<T>&, const at::TensorOptions&);

DCN_INSTANTIATE_COL2IM(double, double)
DCN_INSTANTIATE_COL2IM(float, float)
DCN_INSTANTIATE_COL2IM(c10::Half, float)
DCN_INSTANTIATE_COL2IM(c10::BFloat16, float)
#undef DCN_INSTANTIATE_COL2IM

} // namespace dcn::cuda
