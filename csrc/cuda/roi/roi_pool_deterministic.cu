// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Sums in a fixed order: of the bins of a part, and, on the deterministic way
// into grad_input, of the bins that read a pixel.

#include "cuda/roi/bin_threads.cuh"

namespace dcn::cuda {
namespace {

// What one axis of a bin weighs at one pixel.
template <typename T>
__device__ T weight_at(const BinAxis<T>& bin, int at) {
  T weight = T(0);
  for (int64_t i = bin.begin; i < bin.end; ++i) {
    const BinSample<T> sample = bin_sample(bin, i);
    for (int k = 0; k < 2; ++k) {
      weight +=
          sample.kept && sample.tap.at[k] == at ? sample.tap.weight[k] : T(0);
    }
  }
  return weight;
}

template <typename S, typename T>
struct DeterministicParams {
  RoiTile<S, T> tile;
  RoiTileGradients<S, T> gradients;
};

// Adds the shares of every bin of `group` in kSize output channels, from `c`
// on, at pixel (y, x) to `sums`.
template <int kSize, typename S, typename T>
__device__ void sum_bins(
    const RoiTile<S, T>& tile,
    int64_t image,
    int group,
    int y,
    int x,
    int64_t c,
    T (&sums)[kSize]) {
  const auto& shape = tile.source.shape;
  const int64_t class_index = c / shape.channels_per_class();
  for (int64_t r = 0; r < tile.rois; ++r) {
    const int64_t roi = tile.first_roi + r;
    if (tile.source.image_of(roi) != image) {
      continue;
    }
    for (int i = 0; i < shape.bins.h; ++i) {
      for (int j = 0; j < shape.bins.w; ++j) {
        if (shape.group_of(i, j) != group) {
          continue;
        }
        const auto bin = tile.source.template locate<T>(roi, class_index, i, j);
        if (bin.state != RoiState::kInside) {
          continue;
        }
        const T along_y = weight_at(bin.y, y);
        const T weight =
            along_y == T(0) ? along_y : along_y * weight_at(bin.x, x);
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

// A thread per pixel, group and kSize channels asks every bin for its share.
template <typename S, typename T, int kSize>
__global__ void deterministic_kernel(DeterministicParams<S, T> params) {
  const auto& tile = params.tile;
  const auto& shape = tile.source.shape;
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

template <typename T>
struct OffsetGradParams {
  RoiGeometry source;
  int64_t first_roi;
  int64_t rois;
  const OffsetGrad<T>* offset_grads;
  AnyDtypeView gradient;
};

// The first of `bins` bins that part `part` of `parts` moves.
__device__ int first_bin(int part, int parts, int bins) {
  return (int64_t{part} * bins + parts - 1) / parts;
}

template <typename T>
__global__ void offset_grad_kernel(OffsetGradParams<T> params) {
  const auto& shape = params.source.shape;
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
        const auto& dweight =
            params
                .offset_grads[row * shape.bins.count() + i * shape.bins.w + j];
        y += dweight.y;
        x += dweight.x;
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
void backward_input_deterministic(
    RoiTile<S, T> tile,
    const RoiTileGradients<S, T>& gradients) {
  constexpr int kWide = kVectorSize<S>;
  const bool wide = divides_channels(tile, kWide);
  const int64_t size = wide ? kWide : 1;
  const auto& shape = tile.source.shape;
  assign_threads(tile, size);
  launch(
      wide ? deterministic_kernel<S, T, kWide> : deterministic_kernel<S, T, 1>,
      DeterministicParams<S, T>{tile, gradients},
      tile.images * shape.map.count() * shape.groups.count() *
          (tile.channels / size));
}

template <typename T>
void sum_offset_grads(
    const RoiGeometry& source,
    int64_t first_roi,
    int64_t rois,
    const OffsetGrad<T>* offset_grads,
    const AnyDtypeView& gradient) {
  launch(
      offset_grad_kernel<T>,
      OffsetGradParams<T>{source, first_roi, rois, offset_grads, gradient},
      rois * source.shape.classes * source.shape.parts.count());
}

#define DCN_INSTANTIATE_GATHER(S, T)          \
  template void backward_input_deterministic( \
      RoiTile<S, T>, const RoiTileGradients<S, T>&);

DCN_INSTANTIATE_GATHER(double, double)
DCN_INSTANTIATE_GATHER(float, float)
DCN_INSTANTIATE_GATHER(c10::Half, float)
DCN_INSTANTIATE_GATHER(c10::BFloat16, float)
#undef DCN_INSTANTIATE_GATHER

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
