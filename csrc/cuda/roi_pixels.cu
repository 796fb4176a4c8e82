// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "cuda/roi_pixels.cuh"

#include <limits>

#include "cuda/chunk.cuh"

namespace dcn {
namespace {

// One bin of one class of one RoI, and its channels in the slice.
template <typename T>
struct BinUnit {
  int64_t roi; // of the chunk
  int64_t of_class;
  int i;
  int j;
  int64_t begin; // output channels
  int64_t end;

  template <typename S>
  __device__ BinUnit(const RoiChunk<S, T>& chunk, int64_t index) {
    const auto& shape = chunk.source.shape;
    j = index % shape.bins.w;
    i = index / shape.bins.w % shape.bins.h;
    of_class = index / shape.bins.count() % shape.classes;
    roi = index / shape.bins.count() / shape.classes;
    const int64_t per_class = shape.channels_per_class();
    const int64_t stop = chunk.first_channel + chunk.channels;
    begin = max(of_class * per_class, chunk.first_channel);
    end = min((of_class + 1) * per_class, stop);
  }
};

template <typename S, typename T>
DCN_INLINE int64_t bin_units(const RoiChunk<S, T>& chunk) {
  const auto& shape = chunk.source.shape;
  return chunk.rois * shape.classes * shape.bins.count();
}

// Calls visit(y tap, x tap) for every sample of a bin that is kept.
template <typename T, typename Visit>
__device__ void for_each_sample(const RoiBin<T>& bin, const Visit& visit) {
  for (int64_t i = bin.y.begin; i < bin.y.end; ++i) {
    const BinSample<T> y = bin_sample(bin.y, i);
    if (!y.kept) {
      continue;
    }
    for (int64_t j = bin.x.begin; j < bin.x.end; ++j) {
      const BinSample<T> x = bin_sample(bin.x, j);
      if (x.kept) {
        visit(y.tap, x.tap);
      }
    }
  }
}

template <typename S, typename T>
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
    const bool inside = bin.state == RoiState::kInside;
    const T divisor = inside
        ? bin_divisor(bin.y, bin.x, count_kept(bin.y), count_kept(bin.x))
        : T(0);
    const T nothing = inside || bin.state == RoiState::kEmpty
        ? T(0)
        : std::numeric_limits<T>::quiet_NaN();
    const int group = shape.group_of(unit.i, unit.j);
    for (int64_t c = unit.begin + loop.lane; c < unit.end; c += chunk.lanes) {
      const int64_t channel =
          (c - chunk.first_channel) * chunk.maps.map.channel_stride;
      T sum = T(0);
      if (divisor > T(0)) {
        for_each_sample(bin, [&](const LinearTap<T>& y, const LinearTap<T>& x) {
          for (int k = 0; k < 4; ++k) {
            const T weight = y.weight[k >> 1] * x.weight[k & 1];
            const S* pixel =
                chunk.maps.pixel(image, group, y.at[k >> 1], x.at[k & 1]);
            if (weight != T(0)) {
              sum += weight * static_cast<T>(pixel[channel]);
            }
          }
        });
      }
      S* out = chunk.pooled.pixel(unit.i, unit.j) + roi * chunk.pooled_stride;
      out[c * chunk.pooled.channel_stride] =
          static_cast<S>(divisor > T(0) ? sum / divisor : nothing);
    }
  }
}

template <typename S, typename T>
struct BinBackwardParams {
  RoiChunk<S, T> chunk;
  RoiChunkGradients<S, T> gradients;
};

// One channel of one bin; returns the derivative by the bin's position.
template <typename S, typename T>
__device__ BinSlope<T> backward_channel(
    const BinBackwardParams<S, T>& params,
    const RoiBin<T>& bin,
    int64_t image,
    int group,
    int64_t channel,
    T gradient) {
  const auto& maps = params.chunk.maps;
  const auto& input = params.gradients.input;
  BinSlope<T> slope{T(0), T(0)};
  for_each_sample(bin, [&](const LinearTap<T>& y, const LinearTap<T>& x) {
    for (int k = 0; k < 4; ++k) {
      const int a = k >> 1, b = k & 1;
      const T along_y = y.slope[a] * x.weight[b];
      const T along_x = y.weight[a] * x.slope[b];
      const T weight = y.weight[a] * x.weight[b];
      if (params.gradients.slopes != nullptr &&
          (along_y != T(0) || along_x != T(0))) {
        const S* pixel = maps.pixel(image, group, y.at[a], x.at[b]);
        const T value =
            static_cast<T>(pixel[channel * maps.map.channel_stride]);
        slope.y += along_y * gradient * value;
        slope.x += along_x * gradient * value;
      }
      if (input.map.data != nullptr && weight != T(0)) {
        T* pixel = input.pixel(image, group, y.at[a], x.at[b]);
        const T share[1] = {weight * gradient};
        atomic_add(pixel + channel * input.map.channel_stride, share);
      }
    }
  });
  return slope;
}

template <typename S, typename T>
__global__ void backward_kernel(BinBackwardParams<S, T> params) {
  const auto& chunk = params.chunk;
  const UnitLoop loop(chunk.lanes);
  const int64_t units = bin_units(chunk);
  for (int64_t start = loop.first; start < units; start += loop.step) {
    const int64_t index = loop.own(start, chunk.lanes);
    const bool active = index < units;
    const BinUnit<T> unit(chunk, active ? index : 0);
    const int64_t roi = chunk.first_roi + unit.roi;
    const auto bin =
        chunk.source.template locate<T>(roi, unit.of_class, unit.i, unit.j);
    const int64_t image = bin.image - chunk.first_image;
    const bool here = active && bin.image >= 0 && image >= 0 &&
        image < chunk.images && unit.begin < unit.end;
    BinSlope<T> slope{T(0), T(0)};
    if (here && bin.state == RoiState::kInside) {
      const T divisor =
          bin_divisor(bin.y, bin.x, count_kept(bin.y), count_kept(bin.x));
      const int group = chunk.source.shape.group_of(unit.i, unit.j);
      const S* grad =
          chunk.pooled.pixel(unit.i, unit.j) + roi * chunk.pooled_stride;
      for (int64_t c = unit.begin + loop.lane; divisor > T(0) && c < unit.end;
           c += chunk.lanes) {
        const T gradient =
            static_cast<T>(grad[c * chunk.pooled.channel_stride]) / divisor;
        const auto found = backward_channel(
            params, bin, image, group, c - chunk.first_channel, gradient);
        slope.y += found.y * bin.offset_scale_y;
        slope.x += found.x * bin.offset_scale_x;
      }
    } else if (here && bin.state == RoiState::kNan) {
      slope.y = slope.x = std::numeric_limits<T>::quiet_NaN();
    }
    for (int distance = chunk.lanes / 2; distance > 0; distance /= 2) {
      slope.y += __shfl_xor_sync(0xffffffff, slope.y, distance);
      slope.x += __shfl_xor_sync(0xffffffff, slope.x, distance);
    }
    if (here && loop.lane == 0 && params.gradients.slopes != nullptr) {
      params.gradients.slopes[index].y += slope.y;
      params.gradients.slopes[index].x += slope.x;
    }
  }
}

} // namespace

template <typename S, typename T>
void pool_bins(RoiChunk<S, T> chunk) {
  chunk.lanes = lanes_for(chunk.source.shape.channels_per_class(), 1);
  launch(pool_kernel<S, T>, chunk, bin_units(chunk) * chunk.lanes);
}

template <typename S, typename T>
void backward_bins(
    RoiChunk<S, T> chunk,
    const RoiChunkGradients<S, T>& gradients) {
  chunk.lanes = lanes_for(chunk.source.shape.channels_per_class(), 1);
  launch(
      backward_kernel<S, T>,
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
