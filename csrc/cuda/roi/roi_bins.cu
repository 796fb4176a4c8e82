// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "cuda/roi/roi_bins.cuh"

#include <limits>

#include "cuda/roi/bin_threads.cuh"
#include "cuda/roi/separable_weights.cuh"

namespace dcn {
namespace {

// Adds kSize channels of the pixels of a bin, weighted, to `sums`.
template <int kSize, typename S, typename T>
__device__ __forceinline__ void sum_pixels(
    const MapView<const S>& map,
    const RoiBin<T>& bin,
    T (&sums)[kSize]) {
  for (AxisWalk<T> y(bin.y); y.next();) {
    for (AxisWalk<T> x(bin.x); x.next();) {
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
__global__ void pool_kernel(RoiChunk<S, T> chunk) {
  const auto& shape = chunk.source.shape;
  const UnitLoop loop(chunk.lanes);
  const int64_t units = bin_units(chunk);
  for (int64_t start = loop.first; start < units; start += loop.step) {
    const int64_t index = loop.own(start, chunk.lanes);
    if (index >= units) {
      continue;
    }
    const BinUnit<T> unit(chunk, index);
    const int64_t roi = chunk.first_roi + unit.roi;
    const auto bin =
        chunk.source.template locate<T>(roi, unit.of_class, unit.i, unit.j);
    const int64_t image = max(bin.image, int64_t{0}) - chunk.first_image;
    if (image < 0 || image >= chunk.images) {
      continue;
    }
    const T divisor = divisor_of(bin);
    const T nothing =
        bin.state == RoiState::kInside || bin.state == RoiState::kEmpty
        ? T(0)
        : std::numeric_limits<T>::quiet_NaN();
    const int group = shape.group_of(unit.i, unit.j);
    S* out = chunk.pooled.pixel(unit.i, unit.j) + roi * chunk.pooled_stride;
    for (int64_t c = unit.begin + loop.lane * kSize; c < unit.end;
         c += chunk.lanes * kSize) {
      T sums[kSize] = {};
      if (divisor > T(0)) {
        sum_pixels(
            chunk.maps.view(image, group, c - chunk.first_channel), bin, sums);
      }
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        sums[i] = divisor > T(0) ? sums[i] / divisor : nothing;
      }
      store_pooled(chunk, out + c * chunk.pooled.channel_stride, sums);
    }
  }
}

template <typename S, typename T>
struct BinBackwardParams {
  RoiChunk<S, T> chunk;
  RoiChunkGradients<S, T> gradients;
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
    BinSlope<T>& slope) {
  const bool wants_slope = params.gradients.slopes != nullptr;
  const bool wants_input = params.gradients.input.map.data != nullptr;
  const auto map = params.chunk.maps.view(image, group, channel);
  const MapView<T> input = wants_input
      ? params.gradients.input.view(image, group, channel)
      : MapView<T>{};
  for (AxisWalk<T> y(bin.y); y.next();) {
    for (AxisWalk<T> x(bin.x); x.next();) {
      const T weight = y.weight * x.weight;
      const T along_y = y.slope * x.weight;
      const T along_x = y.weight * x.slope;
      if (wants_slope && (along_y != T(0) || along_x != T(0))) {
        T value[kSize];
        load_values(map.pixel(y.pixel, x.pixel), value);
        T sum = T(0);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          sum += gradient[i] * value[i];
        }
        slope.y += along_y * sum;
        slope.x += along_x * sum;
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
__device__ __forceinline__ BinSlope<T> backward_bin(
    const BinBackwardParams<S, T>& params,
    const BinUnit<T>& unit,
    const RoiBin<T>& bin,
    int64_t image,
    int lane) {
  BinSlope<T> slope{T(0), T(0)};
  const auto& chunk = params.chunk;
  const T divisor = divisor_of(bin);
  if (!(divisor > T(0))) {
    return slope;
  }
  const int group = chunk.source.shape.group_of(unit.i, unit.j);
  const S* grad = chunk.pooled.pixel(unit.i, unit.j) +
      (chunk.first_roi + unit.roi) * chunk.pooled_stride;
  for (int64_t c = unit.begin + lane * kSize; c < unit.end;
       c += chunk.lanes * kSize) {
    T gradient[kSize];
    load_pooled(chunk, grad + c * chunk.pooled.channel_stride, gradient);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      gradient[i] /= divisor;
    }
    backward_pixels(
        params, bin, image, group, c - chunk.first_channel, gradient, slope);
  }
  slope.y *= bin.offset_scale_y;
  slope.x *= bin.offset_scale_x;
  return slope;
}

template <typename S, typename T, int kSize>
__global__ void backward_kernel(BinBackwardParams<S, T> params) {
  const auto& chunk = params.chunk;
  const UnitLoop loop(chunk.lanes);
  const int64_t units = bin_units(chunk);
  for (int64_t start = loop.first; start < units; start += loop.step) {
    const int64_t index = loop.own(start, chunk.lanes);
    const bool active = index < units;
    const BinUnit<T> unit(chunk, active ? index : 0);
    const auto bin = chunk.source.template locate<T>(
        chunk.first_roi + unit.roi, unit.of_class, unit.i, unit.j);
    const int64_t image = bin.image - chunk.first_image;
    const bool here = active && bin.image >= 0 && image >= 0 &&
        image < chunk.images && unit.begin < unit.end;
    BinSlope<T> slope{T(0), T(0)};
    if (here && bin.state == RoiState::kNan) {
      slope.y = slope.x = std::numeric_limits<T>::quiet_NaN();
    } else if (here) {
      slope = backward_bin<kSize>(params, unit, bin, image, loop.lane);
    }
    for (int distance = chunk.lanes / 2; distance > 0; distance /= 2) {
      slope.y += __shfl_xor_sync(0xffffffff, slope.y, distance);
      slope.x += __shfl_xor_sync(0xffffffff, slope.x, distance);
    }
    if (here && loop.lane == 0 && params.gradients.slopes != nullptr) {
      auto& sum = params.gradients.slopes[unit.slope(chunk.source.shape)];
      sum.y += slope.y;
      sum.x += slope.x;
    }
  }
}

} // namespace

template <typename S, typename T>
void pool_bins(RoiChunk<S, T> chunk) {
  constexpr int kWide = kVectorSize<S>;
  const bool wide = has_runs(chunk, kWide) && is_aligned(chunk.maps, kWide);
  deal(chunk, wide ? kWide : 1);
  launch(
      wide ? pool_kernel<S, T, kWide> : pool_kernel<S, T, 1>,
      chunk,
      bin_units(chunk) * chunk.lanes);
}

template <typename S, typename T>
void backward_bins(
    RoiChunk<S, T> chunk,
    const RoiChunkGradients<S, T>& gradients) {
  constexpr int kWide = kVectorSize<S>;
  const bool reads = gradients.slopes != nullptr;
  const bool adds = gradients.input.map.data != nullptr;
  const bool wide = has_runs(chunk, kWide) &&
      (!reads || is_aligned(chunk.maps, kWide)) &&
      (!adds || is_aligned(gradients.input, kWide));
  deal(chunk, wide ? kWide : 1);
  launch(
      wide ? backward_kernel<S, T, kWide> : backward_kernel<S, T, 1>,
      BinBackwardParams<S, T>{chunk, gradients},
      bin_units(chunk) * chunk.lanes);
}

#define DCN_INSTANTIATE_BINS(S, T)         \
  template void pool_bins(RoiChunk<S, T>); \
  template void backward_bins(RoiChunk<S, T>, const RoiChunkGradients<S, T>&);

DCN_INSTANTIATE_BINS(double, double)
DCN_INSTANTIATE_BINS(float, float)
DCN_INSTANTIATE_BINS(c10::Half, float)
DCN_INSTANTIATE_BINS(c10::BFloat16, float)
#undef DCN_INSTANTIATE_BINS

} // namespace dcn
