// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "cuda/conv/deform_im2col.cuh"

#include "cuda/conv/tap_threads.cuh"

namespace dcn {
namespace {

template <typename S>
__device__ __forceinline__ S* corner_pixel(
    const MapView<S>& map,
    int64_t image_offset,
    const int (&y)[2],
    const int (&x)[2],
    int corner) {
  return map.pixel(y[corner >> 1], x[corner & 1]) + image_offset;
}

template <int kSize, typename S, typename T>
__device__ __forceinline__ void fill_column(
    const ColumnChunk<S, T>& chunk,
    S* column,
    int lane,
    T value) {
  T filled[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    filled[i] = value;
  }
  for (int64_t c = lane * kSize; c < chunk.channels; c += chunk.lanes * kSize) {
    store_values(column + c, filled);
  }
}

template <typename S, typename T, int kSize>
__global__ void gather_kernel(ColumnChunk<S, T> chunk) {
  const UnitLoop loop(chunk.lanes);
  const int64_t units = chunk.units();
  for (int64_t start = loop.first; start < units; start += loop.step) {
    const int64_t index = loop.own(start, chunk.lanes);
    if (index >= units) {
      continue;
    }
    const Unit<S, T> unit(chunk, index);
    const DeformTap<T> tap = unit.locate(chunk);
    if (tap.state != TapState::kInside) {
      fill_column<kSize>(
          chunk, unit.column, loop.lane, tap.value_without_pixels());
      continue;
    }
    const int64_t image = unit.map_image * chunk.map_stride;
    for (int64_t c = loop.lane * kSize; c < chunk.channels;
         c += chunk.lanes * kSize) {
      T sum[kSize] = {};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const T weight = tap.share(k);
        const S* pixel = corner_pixel(chunk.map, image, tap.y.at, tap.x.at, k);
        T value[kSize];
        load_values(pixel + c * chunk.map.channel_stride, value);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          sum[i] += weight * value[i];
        }
      }
      store_values(unit.column + c, sum);
    }
  }
}

template <typename S, typename T>
struct BackwardParams {
  ColumnChunk<S, T> chunk;
  ChunkGradients<T> gradients;
};

// kSize channels of one tap: adds gradient * pixel to `sums`, scatters into
// grad_input, and puts the column in the place of its gradient.
template <int kSize, typename S, typename T>
__device__ __forceinline__ void backward_channels(
    const BackwardParams<S, T>& params,
    const Unit<S, T>& unit,
    const DeformTap<T>& tap,
    int64_t c,
    T (&sums)[4]) {
  const auto& chunk = params.chunk;
  const auto& input = params.gradients.input;
  const int64_t image = unit.map_image * chunk.map_stride;
  const int64_t grad_image = unit.map_image * params.gradients.input_stride;
  T gradient[kSize];
  load_values(unit.column + c, gradient);
  T column[kSize] = {};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const S* pixel = corner_pixel(chunk.map, image, tap.y.at, tap.x.at, k);
    T value[kSize];
    load_values(pixel + c * chunk.map.channel_stride, value);
    const T weight = tap.share(k);
    T share[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      sums[k] += gradient[i] * value[i];
      column[i] += weight * value[i];
      share[i] = weight * gradient[i];
    }
    if (input.data != nullptr && weight != T(0)) {
      T* to = corner_pixel(input, grad_image, tap.y.at, tap.x.at, k);
      atomic_add(to + c * input.channel_stride, share);
    }
  }
  if (params.gradients.wants_columns) {
    store_values(unit.column + c, column);
  }
}

template <typename S, typename T>
__device__ __forceinline__ void store_tap_gradient(
    const BackwardParams<S, T>& params,
    const Unit<S, T>& unit,
    const DeformTap<T>& tap,
    const T (&sums)[4]) {
  T gradient[3];
  tap_gradient(tap, sums, gradient);
  const auto& chunk = params.chunk;
  params.gradients.taps.store(
      chunk.taps.geometry,
      unit.image,
      chunk.offset_group,
      unit.y,
      unit.x,
      unit.tap,
      gradient,
      params.gradients.adds_taps);
}

template <typename S, typename T, int kSize>
__global__ void backward_kernel(BackwardParams<S, T> params) {
  const auto& chunk = params.chunk;
  const UnitLoop loop(chunk.lanes);
  const int64_t units = chunk.units();
  for (int64_t start = loop.first; start < units; start += loop.step) {
    const int64_t index = loop.own(start, chunk.lanes);
    const bool active = index < units;
    const Unit<S, T> unit(chunk, active ? index : 0);
    const DeformTap<T> tap = unit.locate(chunk);
    T sums[4] = {};
    if (active && tap.state == TapState::kInside) {
      for (int64_t c = loop.lane * kSize; c < chunk.channels;
           c += chunk.lanes * kSize) {
        backward_channels<kSize>(params, unit, tap, c, sums);
      }
    } else if (active && params.gradients.wants_columns) {
      fill_column<kSize>(
          chunk, unit.column, loop.lane, tap.value_without_pixels());
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      for (int distance = chunk.lanes / 2; distance > 0; distance /= 2) {
        sums[k] += __shfl_xor_sync(0xffffffff, sums[k], distance);
      }
    }
    if (active && loop.lane == 0) {
      store_tap_gradient(params, unit, tap, sums);
    }
  }
}

} // namespace

template <typename S, typename T>
void gather_columns(ColumnChunk<S, T> chunk) {
  const bool wide = is_vectorisable(chunk);
  const int size = wide ? kVectorSize<S> : 1;
  chunk.lanes = lanes_for(chunk.channels, size);
  launch(
      wide ? gather_kernel<S, T, kVectorSize<S>> : gather_kernel<S, T, 1>,
      chunk,
      chunk.units() * chunk.lanes);
}

template <typename S, typename T>
void backward_columns(
    ColumnChunk<S, T> chunk,
    const ChunkGradients<T>& gradients) {
  const bool wide = is_vectorisable(chunk) &&
      (gradients.input.data == nullptr ||
       is_aligned(gradients.input, gradients.input_stride, kVectorSize<S>));
  const int size = wide ? kVectorSize<S> : 1;
  chunk.lanes = lanes_for(chunk.channels, size);
  launch(
      wide ? backward_kernel<S, T, kVectorSize<S>> : backward_kernel<S, T, 1>,
      BackwardParams<S, T>{chunk, gradients},
      chunk.units() * chunk.lanes);
}

#define DCN_INSTANTIATE_COLUMNS(S, T)              \
  template void gather_columns(ColumnChunk<S, T>); \
  template void backward_columns(ColumnChunk<S, T>, const ChunkGradients<T>&);

DCN_INSTANTIATE_COLUMNS(double, double)
DCN_INSTANTIATE_COLUMNS(float, float)
DCN_INSTANTIATE_COLUMNS(c10::Half, float)
DCN_INSTANTIATE_COLUMNS(c10::BFloat16, float)
#undef DCN_INSTANTIATE_COLUMNS

} // namespace dcn
