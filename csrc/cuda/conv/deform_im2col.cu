// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "cuda/conv/deform_im2col.cuh"

#include "cuda/conv/tap_threads.cuh"

namespace dcn::cuda {
namespace {

template <typename S>
__device__ __forceinline__ S* corner_pixel(
    const FeatureMapView<S>& map,
    int64_t image_offset,
    const int (&y)[2],
    const int (&x)[2],
    int corner) {
  return map.pixel(y[corner >> 1], x[corner & 1]) + image_offset;
}

template <int kSize, typename S, typename T>
__device__ __forceinline__ void fill_column(
    const Im2colTile<S, T>& tile,
    S* column,
    int lane,
    T value) {
  T filled[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    filled[i] = value;
  }
  for (int64_t c = lane * kSize; c < tile.channels;
       c += tile.group_size * kSize) {
    store_values(column + c, filled);
  }
}

template <typename S, typename T, int kSize>
__global__ void im2col_kernel(Im2colTile<S, T> tile) {
  const ThreadGroupLoop loop(tile.group_size);
  const int64_t num_taps = tile.num_taps();
  for (int64_t start = loop.first; start < num_taps; start += loop.step) {
    const int64_t index = loop.item(start, tile.group_size);
    if (index >= num_taps) {
      continue;
    }
    const TapIndex<S, T> tap_index(tile, index);
    const DeformTap<T> tap = tap_index.locate(tile);
    if (tap.state != TapState::kInside) {
      fill_column<kSize>(
          tile, tap_index.column, loop.lane, tap.value_outside());
      continue;
    }
    const int64_t image = tap_index.map_image * tile.map_stride;
    for (int64_t c = loop.lane * kSize; c < tile.channels;
         c += tile.group_size * kSize) {
      T sum[kSize] = {};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const T weight = tap.masked_weight(k);
        const S* pixel =
            corner_pixel(tile.map, image, tap.y.pixel, tap.x.pixel, k);
        T value[kSize];
        load_values(pixel + c * tile.map.channel_stride, value);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          sum[i] += weight * value[i];
        }
      }
      store_values(tap_index.column + c, sum);
    }
  }
}

template <typename S, typename T>
struct BackwardParams {
  Im2colTile<S, T> tile;
  Im2colGradients<T> gradients;
};

// kSize channels of one tap, from `c` on: adds gradient * pixel to `sums`,
// scatters into grad_input, and overwrites the column gradient by the column.
template <int kSize, typename S, typename T>
__device__ __forceinline__ void backward_channels(
    const BackwardParams<S, T>& params,
    const TapIndex<S, T>& tap_index,
    const DeformTap<T>& tap,
    int64_t c,
    T (&sums)[4]) {
  const auto& tile = params.tile;
  const auto& input = params.gradients.input;
  const int64_t image = tap_index.map_image * tile.map_stride;
  const int64_t grad_image =
      tap_index.map_image * params.gradients.input_stride;
  const bool needs_pixels =
      params.gradients.offsets.any_defined() || params.gradients.wants_columns;
  T gradient[kSize];
  load_values(tap_index.column + c, gradient);
  T column[kSize] = {};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const S* pixel = corner_pixel(tile.map, image, tap.y.pixel, tap.x.pixel, k);
    T value[kSize] = {};
    if (needs_pixels) {
      load_values(pixel + c * tile.map.channel_stride, value);
    }
    const T weight = tap.masked_weight(k);
    T contribution[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      sums[k] += gradient[i] * value[i];
      column[i] += weight * value[i];
      contribution[i] = weight * gradient[i];
    }
    if (input.data != nullptr && weight != T(0)) {
      T* to = corner_pixel(input, grad_image, tap.y.pixel, tap.x.pixel, k);
      atomic_add(to + c * input.channel_stride, contribution);
    }
  }
  if (params.gradients.wants_columns) {
    store_values(tap_index.column + c, column);
  }
}

template <typename S, typename T>
__device__ __forceinline__ void store_tap_gradient(
    const BackwardParams<S, T>& params,
    const TapIndex<S, T>& tap_index,
    const DeformTap<T>& tap,
    const T (&sums)[4]) {
  T gradient[3];
  tap_gradients(tap, sums, gradient);
  const auto& tile = params.tile;
  params.gradients.offsets.store(
      tile.offsets.geometry,
      tap_index.map_image,
      tile.offset_group,
      tap_index.y,
      tap_index.x,
      tap_index.tap,
      gradient,
      params.gradients.accumulates_offsets);
}

template <typename S, typename T, int kSize>
__global__ void im2col_backward_kernel(BackwardParams<S, T> params) {
  const auto& tile = params.tile;
  const ThreadGroupLoop loop(tile.group_size);
  const int64_t num_taps = tile.num_taps();
  for (int64_t start = loop.first; start < num_taps; start += loop.step) {
    const int64_t index = loop.item(start, tile.group_size);
    const bool active = index < num_taps;
    const TapIndex<S, T> tap_index(tile, active ? index : 0);
    const DeformTap<T> tap = tap_index.locate(tile);
    T sums[4] = {};
    if (active && tap.state == TapState::kInside) {
      for (int64_t c = loop.lane * kSize; c < tile.channels;
           c += tile.group_size * kSize) {
        backward_channels<kSize>(params, tap_index, tap, c, sums);
      }
    } else if (active && params.gradients.wants_columns) {
      fill_column<kSize>(
          tile, tap_index.column, loop.lane, tap.value_outside());
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      for (int distance = tile.group_size / 2; distance > 0; distance /= 2) {
        sums[k] += __shfl_xor_sync(0xffffffff, sums[k], distance);
      }
    }
    if (active && loop.lane == 0) {
      store_tap_gradient(params, tap_index, tap, sums);
    }
  }
}

} // namespace

template <typename S, typename T>
void deform_im2col(Im2colTile<S, T> tile) {
  const bool wide = can_vectorize(tile);
  const int size = wide ? kVectorSize<S> : 1;
  tile.group_size = group_size_for(tile.channels, size);
  launch(
      wide ? im2col_kernel<S, T, kVectorSize<S>> : im2col_kernel<S, T, 1>,
      tile,
      tile.num_taps() * tile.group_size);
}

template <typename S, typename T>
void deform_im2col_backward(
    Im2colTile<S, T> tile,
    const Im2colGradients<T>& gradients) {
  const bool wide = can_vectorize(tile) &&
      (gradients.input.data == nullptr ||
       is_aligned(gradients.input, gradients.input_stride, kVectorSize<S>));
  const int size = wide ? kVectorSize<S> : 1;
  tile.group_size = group_size_for(tile.channels, size);
  launch(
      wide ? im2col_backward_kernel<S, T, kVectorSize<S>>
           : im2col_backward_kernel<S, T, 1>,
      BackwardParams<S, T>{tile, gradients},
      tile.num_taps() * tile.group_size);
}

#define DCN_INSTANTIATE_IM2COL(S, T)             \
  template void deform_im2col(Im2colTile<S, T>); \
  template void deform_im2col_backward(          \
      Im2colTile<S, T>, const Im2colGradients<T>&);

DCN_INSTANTIATE_IM2COL(double, double)
DCN_INSTANTIATE_IM2COL(float, float)
DCN_INSTANTIATE_IM2COL(c10::Half, float)
DCN_INSTANTIATE_IM2COL(c10::BFloat16, float)
#undef DCN_INSTANTIATE_IM2COL

} // namespace dcn::cuda
