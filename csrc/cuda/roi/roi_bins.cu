// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "cuda/roi/roi_bins.cuh"

#include <limits>

#include "cuda/roi/bin_threads.cuh"
#include "cuda/roi/separable_weights.cuh"

namespace dcn::cuda {
namespace {

// Adds kSize channels of the pixels of a bin, weighted, to `sums`.
template <int kSize, typename S, typename T>
__device__ __forceinline__ void sum_pixels(
    const FeatureMapView<const S>& map,
    const RoiBin<T>& bin,
    T (&sums)[kSize]) {
  for (SeparableWeights<T> y(bin.y); y.next();) {
    for (SeparableWeights<T> x(bin.x); x.next();) {
      const T weight = y.weight * x.weight;
      if (weight == T(0)) {
        continue;
      }
      T value[kSize];
      load_values(map.pixel(y.pixel, x.pixel), value);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        sums[i] += weight * value[i];
      }
    }
  }
}

// The number that a bin's sum is divided by; 0 where there is nothing to divide
// or the bin pools no samples.
template <typename T>
__device__ T divisor_of(const RoiBin<T>& bin) {
  return bin.state == RoiState::kInside
      ? bin_divisor(bin.y, bin.x, count_kept(bin.y), count_kept(bin.x))
      : T(0);
}

template <typename S, typename T, int kSize>
__global__ void pool_kernel(RoiTile<S, T> tile) {
  const auto& shape = tile.source.shape;
  const ThreadGroupLoop loop(tile.group_size);
  const int64_t num_bins_total = num_bins(tile);
  for (int64_t start = loop.first; start < num_bins_total; start += loop.step) {
    const int64_t index = loop.index(start, tile.group_size);
    if (index >= num_bins_total) {
      continue;
    }
    const ClassBin<T> bin_index(tile, index);
    const int64_t roi = tile.first_roi + bin_index.roi;
    const auto bin = tile.source.template locate<T>(
        roi, bin_index.class_index, bin_index.i, bin_index.j);
    const int64_t image = max(bin.image, int64_t{0}) - tile.first_image;
    if (image < 0 || image >= tile.images) {
      continue;
    }
    const T divisor = divisor_of(bin);
    const T empty_value =
        bin.state == RoiState::kInside || bin.state == RoiState::kEmpty
        ? T(0)
        : std::numeric_limits<T>::quiet_NaN();
    const int group = shape.group_of(bin_index.i, bin_index.j);
    S* out =
        tile.pooled.pixel(bin_index.i, bin_index.j) + roi * tile.pooled_stride;
    for (int64_t c = bin_index.begin + loop.lane * kSize; c < bin_index.end;
         c += tile.group_size * kSize) {
      T sums[kSize] = {};
      if (divisor > T(0)) {
        sum_pixels(
            tile.maps.view(image, group, c - tile.first_channel), bin, sums);
      }
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        sums[i] = divisor > T(0) ? sums[i] / divisor : empty_value;
      }
      store_pooled(tile, out + c * tile.pooled.channel_stride, sums);
    }
  }
}

template <typename S, typename T>
struct BinBackwardParams {
  RoiTile<S, T> tile;
  RoiTileGradients<S, T> gradients;
};

// kSize channels of one bin, from `channel` of the maps on: scatters into
// grad_input and adds the derivative by the bin's position to `slope`.
template <int kSize, typename S, typename T>
__device__ __forceinline__ void backward_pixels(
    const BinBackwardParams<S, T>& params,
    const RoiBin<T>& bin,
    int64_t image,
    int group,
    int64_t channel,
    const T (&gradient)[kSize],
    OffsetGrad<T>& dweight) {
  const bool wants_offset = params.gradients.offset_grads != nullptr;
  const bool wants_input = params.gradients.input.map.data != nullptr;
  const auto map = params.tile.maps.view(image, group, channel);
  const FeatureMapView<T> input = wants_input
      ? params.gradients.input.view(image, group, channel)
      : FeatureMapView<T>{};
  for (SeparableWeights<T> y(bin.y); y.next();) {
    for (SeparableWeights<T> x(bin.x); x.next();) {
      const T weight = y.weight * x.weight;
      const T along_y = y.dweight * x.weight;
      const T along_x = y.weight * x.dweight;
      if (wants_offset && (along_y != T(0) || along_x != T(0))) {
        T value[kSize];
        load_values(map.pixel(y.pixel, x.pixel), value);
        T sum = T(0);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          sum += gradient[i] * value[i];
        }
        dweight.y += along_y * sum;
        dweight.x += along_x * sum;
      }
      if (wants_input && weight != T(0)) {
        T share[kSize];
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          share[i] = weight * gradient[i];
        }
        atomic_add(input.pixel(y.pixel, x.pixel), share);
      }
    }
  }
}

// A thread's channels of one bin; returns the derivative by the bin's offset.
template <int kSize, typename S, typename T>
__device__ __forceinline__ OffsetGrad<T> backward_bin(
    const BinBackwardParams<S, T>& params,
    const ClassBin<T>& bin_index,
    const RoiBin<T>& bin,
    int64_t image,
    int lane) {
  OffsetGrad<T> dweight{T(0), T(0)};
  const auto& tile = params.tile;
  const T divisor = divisor_of(bin);
  if (!(divisor > T(0))) {
    return dweight;
  }
  const int group = tile.source.shape.group_of(bin_index.i, bin_index.j);
  const S* grad = tile.pooled.pixel(bin_index.i, bin_index.j) +
      (tile.first_roi + bin_index.roi) * tile.pooled_stride;
  for (int64_t c = bin_index.begin + lane * kSize; c < bin_index.end;
       c += tile.group_size * kSize) {
    T gradient[kSize];
    load_pooled(tile, grad + c * tile.pooled.channel_stride, gradient);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      gradient[i] /= divisor;
    }
    backward_pixels(
        params, bin, image, group, c - tile.first_channel, gradient, dweight);
  }
  dweight.y *= bin.offset_scale_y;
  dweight.x *= bin.offset_scale_x;
  return dweight;
}

template <typename S, typename T, int kSize>
__global__ void backward_kernel(BinBackwardParams<S, T> params) {
  const auto& tile = params.tile;
  const ThreadGroupLoop loop(tile.group_size);
  const int64_t num_bins_total = num_bins(tile);
  for (int64_t start = loop.first; start < num_bins_total; start += loop.step) {
    const int64_t index = loop.index(start, tile.group_size);
    const bool active = index < num_bins_total;
    const ClassBin<T> bin_index(tile, active ? index : 0);
    const auto bin = tile.source.template locate<T>(
        tile.first_roi + bin_index.roi,
        bin_index.class_index,
        bin_index.i,
        bin_index.j);
    const int64_t image = bin.image - tile.first_image;
    const bool here = active && bin.image >= 0 && image >= 0 &&
        image < tile.images && bin_index.begin < bin_index.end;
    OffsetGrad<T> dweight{T(0), T(0)};
    if (here && bin.state == RoiState::kNan) {
      dweight.y = dweight.x = std::numeric_limits<T>::quiet_NaN();
    } else if (here) {
      dweight = backward_bin<kSize>(params, bin_index, bin, image, loop.lane);
    }
    for (int distance = tile.group_size / 2; distance > 0; distance /= 2) {
      dweight.y += __shfl_xor_sync(0xffffffff, dweight.y, distance);
      dweight.x += __shfl_xor_sync(0xffffffff, dweight.x, distance);
    }
    if (here && loop.lane == 0 && params.gradients.offset_grads != nullptr) {
      auto& sum =
          params.gradients.offset_grads[bin_index.dweight(tile.source.shape)];
      sum.y += dweight.y;
      sum.x += dweight.x;
    }
  }
}

} // namespace

template <typename S, typename T>
void pool_bins(RoiTile<S, T> tile) {
  constexpr int kWide = kVectorSize<S>;
  const bool wide =
      divides_channels(tile, kWide) && is_aligned(tile.maps, kWide);
  assign_threads(tile, wide ? kWide : 1);
  launch(
      wide ? pool_kernel<S, T, kWide> : pool_kernel<S, T, 1>,
      tile,
      num_bins(tile) * tile.group_size);
}

template <typename S, typename T>
void backward_bins(
    RoiTile<S, T> tile,
    const RoiTileGradients<S, T>& gradients) {
  constexpr int kWide = kVectorSize<S>;
  const bool reads = gradients.offset_grads != nullptr;
  const bool adds = gradients.input.map.data != nullptr;
  const bool wide = divides_channels(tile, kWide) &&
      (!reads || is_aligned(tile.maps, kWide)) &&
      (!adds || is_aligned(gradients.input, kWide));
  assign_threads(tile, wide ? kWide : 1);
  launch(
      wide ? backward_kernel<S, T, kWide> : backward_kernel<S, T, 1>,
      BinBackwardParams<S, T>{tile, gradients},
      num_bins(tile) * tile.group_size);
}

#define DCN_INSTANTIATE_BINS(S, T)        \
  template void pool_bins(RoiTile<S, T>); \
  template void backward_bins(RoiTile<S, T>, const RoiTileGradients<S, T>&);

DCN_INSTANTIATE_BINS(double, double)
DCN_INSTANTIATE_BINS(float, float)
DCN_INSTANTIATE_BINS(c10::Half, float)
DCN_INSTANTIATE_BINS(c10::BFloat16, float)
#undef DCN_INSTANTIATE_BINS

} // namespace dcn::cuda
