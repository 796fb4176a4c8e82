// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Sums in a fixed order: of the bins of a part, and, on the deterministic way
// into grad_input, of the bins that read a pixel.

#include "cuda/launch.cuh"
#include "cuda/roi_pixels.cuh"

namespace dcn {
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
struct GatherParams {
  RoiChunk<S, T> chunk;
  RoiChunkGradients<S, T> gradients;
};

// A thread per pixel, group and channel asks every bin for its share.
template <typename S, typename T>
__global__ void gather_kernel(GatherParams<S, T> params) {
  const auto& chunk = params.chunk;
  const auto& shape = chunk.source.shape;
  const int64_t groups = shape.groups.count();
  const int64_t pixels = shape.map.count();
  const int64_t count = chunk.images * pixels * groups * chunk.channels;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
       index < count;
       index += step) {
    const int64_t channel = index % chunk.channels;
    const int group = index / chunk.channels % groups;
    const int64_t pixel = index / chunk.channels / groups % pixels;
    const int64_t image = index / chunk.channels / groups / pixels;
    const int y = pixel / shape.map.w, x = pixel % shape.map.w;
    const int64_t c = chunk.first_channel + channel;
    T sum = T(0);
    for (int64_t r = 0; r < chunk.rois; ++r) {
      const int64_t roi = chunk.first_roi + r;
      if (chunk.source.image_of(roi) != chunk.first_image + image) {
        continue;
      }
      for (int bin = 0; bin < shape.bins.count(); ++bin) {
        const int i = bin / shape.bins.w, j = bin % shape.bins.w;
        if (shape.group_of(i, j) != group) {
          continue;
        }
        const auto located = chunk.source.template locate<T>(
            roi, c / shape.channels_per_class(), i, j);
        if (located.state != RoiState::kInside) {
          continue;
        }
        const T weight = weight_at(located.y, y) * weight_at(located.x, x);
        if (weight != T(0)) {
          const S* grad = chunk.pooled.pixel(i, j) + roi * chunk.pooled_stride;
          const T divisor = bin_divisor(
              located.y,
              located.x,
              count_kept(located.y),
              count_kept(located.x));
          sum += weight *
              (static_cast<T>(grad[c * chunk.pooled.channel_stride]) / divisor);
        }
      }
    }
    const auto& input = params.gradients.input;
    input.pixel(image, group, y, x)[channel * input.map.channel_stride] += sum;
  }
}

template <typename T>
struct SlopeParams {
  RoiSource source;
  int64_t first_roi;
  int64_t rois;
  const BinSlope<T>* slopes;
  FloatView gradient;
};

template <typename T>
__global__ void slope_kernel(SlopeParams<T> params) {
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
    T y = T(0), x = T(0);
    for (int i = 0; i < shape.bins.h; ++i) {
      for (int j = 0; j < shape.bins.w; ++j) {
        if (params.source.part_y(i) == part_y &&
            params.source.part_x(j) == part_x) {
          const auto& slope =
              params.slopes[row * shape.bins.count() + i * shape.bins.w + j];
          y += slope.y;
          x += slope.x;
        }
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
void gather_bins(
    RoiChunk<S, T> chunk,
    const RoiChunkGradients<S, T>& gradients) {
  const auto& shape = chunk.source.shape;
  launch(
      gather_kernel<S, T>,
      GatherParams<S, T>{chunk, gradients},
      chunk.images * shape.map.count() * shape.groups.count() * chunk.channels);
}

template <typename T>
void sum_slopes(
    const RoiSource& source,
    int64_t first_roi,
    int64_t rois,
    const BinSlope<T>* slopes,
    const FloatView& gradient) {
  launch(
      slope_kernel<T>,
      SlopeParams<T>{source, first_roi, rois, slopes, gradient},
      rois * source.shape.classes * source.shape.parts.count());
}

#define DCN_INSTANTIATE_GATHER(S, T) \
  template void gather_bins(RoiChunk<S, T>, const RoiChunkGradients<S, T>&);

DCN_INSTANTIATE_GATHER(double, double)
DCN_INSTANTIATE_GATHER(float, float)
DCN_INSTANTIATE_GATHER(c10::Half, float)
DCN_INSTANTIATE_GATHER(c10::BFloat16, float)
#undef DCN_INSTANTIATE_GATHER

template void sum_slopes(
    const RoiSource&,
    int64_t,
    int64_t,
    const BinSlope<float>*,
    const FloatView&);
template void sum_slopes(
    const RoiSource&,
    int64_t,
    int64_t,
    const BinSlope<double>*,
    const FloatView&);

} // namespace dcn
