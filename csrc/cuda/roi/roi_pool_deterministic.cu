// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Deterministic gradient of the input of RoI pooling, used under
// torch.use_deterministic_algorithms: each pixel sums the contributions of all
// bins that read it, in a fixed order. Slow, since every thread visits every
// bin.

#include "cuda/roi/bin_threads.cuh"

namespace dcn::cuda {
namespace {

// The weight of a bin at one pixel, along one axis.
template <typename T>
__device__ T weight_at(const BinAxis<T>& bin, int pixel) {
  T weight = T(0);
  for (int64_t i = bin.begin; i < bin.end; ++i) {
    const BinSample<T> sample = bin_sample(bin, i);
    for (int k = 0; k < 2; ++k) {
      weight += sample.kept && sample.tap.pixel[k] == pixel
          ? sample.tap.weight[k]
          : T(0);
    }
  }
  return weight;
}

template <typename S, typename T>
struct DeterministicParams {
  RoiTile<S, T> tile;
  RoiTileGradients<S, T> gradients;
};

// Adds the contributions of every bin of `group` to pixel (y, x) of kSize
// output channels, from `c` on, to `sums`.
template <int kSize, typename S, typename T>
__device__ void sum_bins(
    const RoiTile<S, T>& tile,
    int64_t image,
    int group,
    int y,
    int x,
    int64_t c,
    T (&sums)[kSize]) {
  const auto& shape = tile.geometry.shape;
  const int64_t class_index = c / shape.channels_per_class();
  for (int64_t r = 0; r < tile.rois; ++r) {
    const int64_t roi = tile.first_roi + r;
    if (tile.geometry.image_of(roi) != image) {
      continue;
    }
    for (int i = 0; i < shape.bins.h; ++i) {
      for (int j = 0; j < shape.bins.w; ++j) {
        if (shape.group_of(i, j) != group) {
          continue;
        }
        const auto bin =
            tile.geometry.template locate<T>(roi, class_index, i, j);
        if (bin.state != RoiState::kInside) {
          continue;
        }
        const T weight_y = weight_at(bin.y, y);
        const T weight =
            weight_y == T(0) ? weight_y : weight_y * weight_at(bin.x, x);
        if (weight == T(0)) {
          continue;
        }
        const T divisor =
            bin_divisor(bin.y, bin.x, count_kept(bin.y), count_kept(bin.x));
        T gradient[kSize];
        load_pooled(
            tile,
            tile.pooled.pixel(i, j) + roi * tile.pooled_stride +
                c * tile.pooled.channel_stride,
            gradient);
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          sums[k] += weight * (gradient[k] / divisor);
        }
      }
    }
  }
}

// One thread per pixel, group and kSize channels.
template <typename S, typename T, int kSize>
__global__ void deterministic_kernel(DeterministicParams<S, T> params) {
  const auto& tile = params.tile;
  const auto& shape = tile.geometry.shape;
  const int64_t channel_blocks = tile.channels / kSize;
  const int64_t groups = shape.groups.count();
  const int64_t pixels = shape.map.count();
  const int64_t count = tile.images * pixels * groups * channel_blocks;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
       index < count;
       index += step) {
    const int64_t channel = index % channel_blocks * kSize;
    const int group = index / channel_blocks % groups;
    const int64_t pixel = index / channel_blocks / groups % pixels;
    const int64_t image = index / channel_blocks / groups / pixels;
    const int y = pixel / shape.map.w, x = pixel % shape.map.w;
    T sums[kSize] = {};
    sum_bins(
        tile,
        tile.first_image + image,
        group,
        y,
        x,
        tile.first_channel + channel,
        sums);
    const auto input = params.gradients.input.view(image, group, channel);
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      input.pixel(y, x)[k * input.channel_stride] += sums[k];
    }
  }
}

} // namespace

template <typename S, typename T>
void backward_input_deterministic(
    RoiTile<S, T> tile,
    const RoiTileGradients<S, T>& gradients) {
  constexpr int kWide = kVectorSize<S>;
  const bool wide = divides_channels(tile, kWide);
  const int64_t size = wide ? kWide : 1;
  const auto& shape = tile.geometry.shape;
  assign_threads(tile, size);
  launch(
      wide ? deterministic_kernel<S, T, kWide> : deterministic_kernel<S, T, 1>,
      DeterministicParams<S, T>{tile, gradients},
      tile.images * shape.map.count() * shape.groups.count() *
          (tile.channels / size));
}

#define DCN_INSTANTIATE_DETERMINISTIC(S, T)   \
  template void backward_input_deterministic( \
      RoiTile<S, T>, const RoiTileGradients<S, T>&);

DCN_INSTANTIATE_DETERMINISTIC(double, double)
DCN_INSTANTIATE_DETERMINISTIC(float, float)
DCN_INSTANTIATE_DETERMINISTIC(c10::Half, float)
DCN_INSTANTIATE_DETERMINISTIC(c10::BFloat16, float)
#undef DCN_INSTANTIATE_DETERMINISTIC

} // namespace dcn::cuda
