// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "cuda/roi/roi_bins.cuh"

#include <limits>

#include "cuda/roi/bin_threads.cuh"
#include "cuda/roi/separable_weights.cuh"

namespace dcn::cuda {
namespace {

// Adds the weighted pixels of a bin, kSize channels, to `sums`.
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

template <typename S, typename T, int kSize>
__global__ void pool_kernel(RoiTile<S, T> tile) {
  const auto& shape = tile.geometry.shape;
  const ThreadGroupLoop loop(tile.group_size);
  const int64_t bin_count = num_bins(tile);
  for (int64_t start = loop.first; start < bin_count; start += loop.step) {
    const int64_t index = loop.item(start, tile.group_size);
    if (index >= bin_count) {
      continue;
    }
    const ClassBin<T> bin_index(tile, index);
    const int64_t roi = tile.first_roi + bin_index.roi;
    const auto bin = bin_index.locate(tile);
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
// grad_input and adds the gradient of the bin's position to `offset_grad`.
template <int kSize, typename S, typename T>
__device__ __forceinline__ void backward_pixels(
    const BinBackwardParams<S, T>& params,
    const RoiBin<T>& bin,
    int64_t image,
    int group,
    int64_t channel,
    const T (&gradient)[kSize],
    OffsetGrad<T>& offset_grad) {
  const bool wants_offset = params.gradients.offset_grads != nullptr;
  const bool wants_input = params.gradients.input.map.data != nullptr;
  const auto map = params.tile.maps.view(image, group, channel);
  const FeatureMapView<T> input = wants_input
      ? params.gradients.input.view(image, group, channel)
      : FeatureMapView<T>{};
  for (SeparableWeights<T> y(bin.y); y.next();) {
    for (SeparableWeights<T> x(bin.x); x.next();) {
      const T weight = y.weight * x.weight;
      const T weight_dy = y.dweight * x.weight;
      const T weight_dx = y.weight * x.dweight;
      if (wants_offset && (weight_dy != T(0) || weight_dx != T(0))) {
        T value[kSize];
        load_values(map.pixel(y.pixel, x.pixel), value);
        T sum = T(0);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          sum += gradient[i] * value[i];
        }
        offset_grad.y += weight_dy * sum;
        offset_grad.x += weight_dx * sum;
      }
      if (wants_input && weight != T(0)) {
        T contribution[kSize];
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          contribution[i] = weight * gradient[i];
        }
        atomic_add(input.pixel(y.pixel, x.pixel), contribution);
      }
    }
  }
}

// Processes this thread's channels of one bin; returns their offset gradient.
template <int kSize, typename S, typename T>
__device__ __forceinline__ OffsetGrad<T> backward_bin(
    const BinBackwardParams<S, T>& params,
    const ClassBin<T>& bin_index,
    const RoiBin<T>& bin,
    int64_t image,
    int lane) {
  OffsetGrad<T> offset_grad{T(0), T(0)};
  const auto& tile = params.tile;
  const T divisor = divisor_of(bin);
  if (!(divisor > T(0))) {
    return offset_grad;
  }
  const int group = tile.geometry.shape.group_of(bin_index.i, bin_index.j);
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
        params,
        bin,
        image,
        group,
        c - tile.first_channel,
        gradient,
        offset_grad);
  }
  offset_grad.y *= bin.offset_scale_y;
  offset_grad.x *= bin.offset_scale_x;
  return offset_grad;
}

template <typename S, typename T, int kSize>
__global__ void backward_kernel(BinBackwardParams<S, T> params) {
  const auto& tile = params.tile;
  const ThreadGroupLoop loop(tile.group_size);
  const int64_t bin_count = num_bins(tile);
  for (int64_t start = loop.first; start < bin_count; start += loop.step) {
    const int64_t index = loop.item(start, tile.group_size);
    const bool active = index < bin_count;
    const ClassBin<T> bin_index(tile, active ? index : 0);
    const auto bin = bin_index.locate(tile);
    const int64_t image = bin.image - tile.first_image;
    const bool in_tile = active && bin.image >= 0 && image >= 0 &&
        image < tile.images && bin_index.begin < bin_index.end;
    OffsetGrad<T> offset_grad{T(0), T(0)};
    if (in_tile && bin.state == RoiState::kNan) {
      offset_grad.y = offset_grad.x = std::numeric_limits<T>::quiet_NaN();
    } else if (in_tile) {
      offset_grad =
          backward_bin<kSize>(params, bin_index, bin, image, loop.lane);
    }
    for (int distance = tile.group_size / 2; distance > 0; distance /= 2) {
      offset_grad.y += __shfl_xor_sync(0xffffffff, offset_grad.y, distance);
      offset_grad.x += __shfl_xor_sync(0xffffffff, offset_grad.x, distance);
    }
    if (in_tile && loop.lane == 0 && params.gradients.offset_grads != nullptr) {
      auto& sum =
          params.gradients
              .offset_grads[bin_index.offset_grad_index(tile.geometry.shape)];
      sum.y += offset_grad.y;
      sum.x += offset_grad.x;
    }
  }
}

template <typename T>
struct OffsetGradParams {
  RoiGeometry geometry;
  int64_t first_roi;
  int64_t rois;
  const OffsetGrad<T>* offset_grads;
  AnyDtypeView gradient;
};

template <typename T>
__global__ void offset_grad_kernel(OffsetGradParams<T> params) {
  const auto& shape = params.geometry.shape;
  const int64_t parts = shape.parts.count();
  const int64_t count = params.rois * shape.classes * parts;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
       index < count;
       index += step) {
    const int part_y = index % parts / shape.parts.w;
    const int part_x = index % shape.parts.w;
    const int64_t row = index / parts; // (roi, class)
    const int end_i = first_bin(part_y + 1, shape.parts.h, shape.bins.h);
    const int end_j = first_bin(part_x + 1, shape.parts.w, shape.bins.w);
    const int begin_j = first_bin(part_x, shape.parts.w, shape.bins.w);
    T y = T(0), x = T(0);
    for (int i = first_bin(part_y, shape.parts.h, shape.bins.h); i < end_i;
         ++i) {
      for (int j = begin_j; j < end_j; ++j) {
        const auto& offset_grad =
            params
                .offset_grads[row * shape.bins.count() + i * shape.bins.w + j];
        y += offset_grad.y;
        x += offset_grad.x;
      }
    }
    const int64_t roi = params.first_roi + row / shape.classes;
    const int64_t plane = 2 * (row % shape.classes);
    const auto& to = params.gradient;
    to.store(to.at(roi, plane, part_y, part_x), x);
    to.store(to.at(roi, plane + 1, part_y, part_x), y);
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

template <typename T>
void sum_offset_grads(
    const RoiGeometry& geometry,
    int64_t first_roi,
    int64_t rois,
    const OffsetGrad<T>* offset_grads,
    const AnyDtypeView& gradient) {
  launch(
      offset_grad_kernel<T>,
      OffsetGradParams<T>{geometry, first_roi, rois, offset_grads, gradient},
      rois * geometry.shape.classes * geometry.shape.parts.count());
}

#define DCN_INSTANTIATE_BINS(S, T)        \
  template void pool_bins(RoiTile<S, T>); \
  template void backward_bins(RoiTile<S, T>, const RoiTileGradients<S, T>&);

DCN_INSTANTIATE_BINS(double, double)
DCN_INSTANTIATE_BINS(float, float)
DCN_INSTANTIATE_BINS(c10::Half, float)
DCN_INSTANTIATE_BINS(c10::BFloat16, float)
#undef DCN_INSTANTIATE_BINS

template void sum_offset_grads(
    const RoiGeometry&,
    int64_t,
    int64_t,
    const OffsetGrad<float>*,
    const AnyDtypeView&);
template void sum_offset_grads(
    const RoiGeometry&,
    int64_t,
    int64_t,
    const OffsetGrad<double>*,
    const AnyDtypeView&);

} // namespace dcn::cuda
