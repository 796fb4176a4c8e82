// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "cpu/roi/bin_kernels.h"

#include <algorithm>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

namespace dcn::cpu {
namespace {

template <typename S, typename T>
DCN_INLINE void add_pixel(
    const S* pixel,
    int64_t stride,
    T weight,
    int64_t channels,
    T* sums) {
  if (stride == 1) {
    for (int64_t c = 0; c < channels; ++c) {
      sums[c] += weight * static_cast<T>(pixel[c]);
    }
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      sums[c] += weight * static_cast<T>(pixel[c * stride]);
    }
  }
}

template <typename S, typename T>
DCN_INLINE T
dot_pixel(const S* pixel, int64_t stride, const T* gradient, int64_t channels) {
  T sum = 0;
  if (stride == 1) {
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < channels; ++c) {
      sum += gradient[c] * static_cast<T>(pixel[c]);
    }
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      sum += gradient[c] * static_cast<T>(pixel[c * stride]);
    }
  }
  return sum;
}

template <typename T>
DCN_INLINE void scatter_pixel(
    T* pixel,
    int64_t stride,
    T weight,
    const T* gradient,
    int64_t channels) {
  if (stride == 1) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      pixel[c] += weight * gradient[c];
    }
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      pixel[c * stride] += weight * gradient[c];
    }
  }
}

template <typename S, typename T>
DCN_INLINE void pool_vectorized_body(
    const FeatureMapView<const S>& map,
    const SeparableWeights<T>& y,
    const SeparableWeights<T>& x,
    int64_t channels,
    T* sums) {
  std::fill_n(sums, channels, T(0));
  for (int row = y.begin; row < y.end; ++row) {
    for (int column = x.begin; column < x.end; ++column) {
      const T weight = y.weight(row) * x.weight(column);
      if (weight != T(0)) {
        add_pixel(
            map.pixel(row, column), map.channel_stride, weight, channels, sums);
      }
    }
  }
}

template <typename S, typename T>
DCN_INLINE OffsetGrad<T> backward_vectorized_body(
    const FeatureMapView<const S>& map,
    const SeparableWeights<T>& y,
    const SeparableWeights<T>& x,
    int64_t channels,
    const T* gradient,
    bool wants_offset,
    const FeatureMapView<T>& input) {
  OffsetGrad<T> grad{0, 0};
  for (int row = y.begin; row < y.end; ++row) {
    for (int column = x.begin; column < x.end; ++column) {
      const T weight = y.weight(row) * x.weight(column);
      const T along_y = y.dweight(row) * x.weight(column);
      const T along_x = y.weight(row) * x.dweight(column);
      if (wants_offset && (along_y != T(0) || along_x != T(0))) {
        const T sum = dot_pixel(
            map.pixel(row, column), map.channel_stride, gradient, channels);
        grad.y += along_y * sum;
        grad.x += along_x * sum;
      }
      if (input.data != nullptr && weight != T(0)) {
        scatter_pixel(
            input.pixel(row, column),
            input.channel_stride,
            weight,
            gradient,
            channels);
      }
    }
  }
  return grad;
}

} // namespace

#define DCN_DEFINE_VECTORIZED(S, T)                          \
  template <>                                                \
  DCN_VECTOR_CLONES void pool_vectorized(                    \
      const FeatureMapView<const S>& map,                    \
      const SeparableWeights<T>& y,                          \
      const SeparableWeights<T>& x,                          \
      int64_t channels,                                      \
      T* sums) {                                             \
    pool_vectorized_body(map, y, x, channels, sums);         \
  }                                                          \
  template <>                                                \
  DCN_VECTOR_CLONES OffsetGrad<T> backward_vectorized(       \
      const FeatureMapView<const S>& map,                    \
      const SeparableWeights<T>& y,                          \
      const SeparableWeights<T>& x,                          \
      int64_t channels,                                      \
      const T* gradient,                                     \
      bool wants_offset,                                     \
      const FeatureMapView<T>& input) {                      \
    return backward_vectorized_body(                         \
        map, y, x, channels, gradient, wants_offset, input); \
  }

DCN_DEFINE_VECTORIZED(double, double)
DCN_DEFINE_VECTORIZED(float, float)
DCN_DEFINE_VECTORIZED(c10::Half, float)
DCN_DEFINE_VECTORIZED(c10::BFloat16, float)
#undef DCN_DEFINE_VECTORIZED

} // namespace dcn::cpu
