// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "cpu/conv/deform_im2col.h"

#include <algorithm>

#include "cpu/round.h"
#include "cpu/vector.h"

namespace dcn::cpu {
namespace {

// The channels of a slice, as the loops below run over them: `kCount`
// contiguous ones, which are one vector; contiguous ones; or strided ones.
template <int64_t kCount>
struct FixedChannels {
  constexpr int64_t count() const {
    return kCount;
  }
};

struct ContiguousChannels {
  int64_t size;
  static constexpr int64_t stride() {
    return 1;
  }
  int64_t count() const {
    return size;
  }
};

struct StridedChannels {
  int64_t size;
  int64_t step;
  int64_t stride() const {
    return step;
  }
  int64_t count() const {
    return size;
  }
};

// Calls body(channels) with the type for which the fastest code is compiled.
template <typename Body>
DCN_INLINE void with_channels(int64_t count, int64_t stride, const Body& body) {
  if (stride != 1) {
    body(StridedChannels{count, stride});
  } else if (count == 4) {
    body(FixedChannels<4>{});
  } else if (count == 8) {
    body(FixedChannels<8>{});
  } else if (count == 16) {
    body(FixedChannels<16>{});
  } else {
    body(ContiguousChannels{count});
  }
}

template <typename S, typename T>
struct Corners {
  const S* pixel[4];
  T masked_weight[4];
};

template <typename S, typename T>
DCN_INLINE Corners<S, T> load_corners(
    const S* map,
    const PlannedTaps<T>& taps,
    int64_t index) {
  Corners<S, T> corners;
  for (int k = 0; k < 4; ++k) {
    const int64_t i = index + k * taps.corner_stride;
    corners.pixel[k] = map + taps.pixels[i];
    corners.masked_weight[k] = taps.masked_weights[i];
  }
  return corners;
}

template <typename S, typename T, typename C, typename Channels>
DCN_INLINE void interpolate(
    const Corners<S, T>& from,
    Channels channels,
    C* row) {
  const S *p0 = from.pixel[0], *p1 = from.pixel[1];
  const S *p2 = from.pixel[2], *p3 = from.pixel[3];
  const T w0 = from.masked_weight[0], w1 = from.masked_weight[1];
  const T w2 = from.masked_weight[2], w3 = from.masked_weight[3];
#pragma omp simd
  for (int64_t c = 0; c < channels.count(); ++c) {
    const int64_t i = c * channels.stride();
    row[c] = round_to<C>(
        w0 * static_cast<T>(p0[i]) + w1 * static_cast<T>(p1[i]) +
        w2 * static_cast<T>(p2[i]) + w3 * static_cast<T>(p3[i]));
  }
}

template <typename S, typename T, typename C, int64_t kCount>
DCN_INLINE void interpolate(
    const Corners<S, T>& from,
    FixedChannels<kCount>,
    C* row) {
  auto sum = from.masked_weight[0] * load_vector<T, kCount>(from.pixel[0]);
  for (int k = 1; k < 4; ++k) {
    sum += from.masked_weight[k] * load_vector<T, kCount>(from.pixel[k]);
  }
  store_vector<T, kCount>(sum, row);
}

// Sum over channels of gradient * pixel, for each of the four corners.
template <typename S, typename T, typename Channels>
DCN_INLINE void dot_corners(
    const Corners<S, T>& corners,
    const T* gradient,
    Channels channels,
    T (&sums)[4]) {
  const S *p0 = corners.pixel[0], *p1 = corners.pixel[1];
  const S *p2 = corners.pixel[2], *p3 = corners.pixel[3];
  T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t c = 0; c < channels.count(); ++c) {
    const int64_t i = c * channels.stride();
    s0 += gradient[c] * static_cast<T>(p0[i]);
    s1 += gradient[c] * static_cast<T>(p1[i]);
    s2 += gradient[c] * static_cast<T>(p2[i]);
    s3 += gradient[c] * static_cast<T>(p3[i]);
  }
  sums[0] = s0;
  sums[1] = s1;
  sums[2] = s2;
  sums[3] = s3;
}

template <typename T>
DCN_INLINE void scatter_corner(
    T* pixel,
    T weight,
    const T* gradient,
    int64_t stride,
    int64_t count) {
  if (stride == 1) {
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) {
      pixel[c] += weight * gradient[c];
    }
  } else {
    for (int64_t c = 0; c < count; ++c) {
      pixel[c * stride] += weight * gradient[c];
    }
  }
}

// Gradients of offset, mask and input, and the column, in one pass over the
// channels. The four corners must be distinct pixels.
template <typename S, typename T>
DCN_INLINE void fused_tap_backward(
    const Corners<S, T>& from,
    T* const (&grads)[4],
    int64_t channels,
    T* row,
    T (&sums)[4]) {
  const S *p0 = from.pixel[0], *p1 = from.pixel[1];
  const S *p2 = from.pixel[2], *p3 = from.pixel[3];
  const T w0 = from.masked_weight[0], w1 = from.masked_weight[1];
  const T w2 = from.masked_weight[2], w3 = from.masked_weight[3];
  T *g0 = grads[0], *g1 = grads[1], *g2 = grads[2], *g3 = grads[3];
  T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t c = 0; c < channels; ++c) {
    const T gradient = row[c];
    const T v0 = static_cast<T>(p0[c]), v1 = static_cast<T>(p1[c]);
    const T v2 = static_cast<T>(p2[c]), v3 = static_cast<T>(p3[c]);
    s0 += gradient * v0;
    s1 += gradient * v1;
    s2 += gradient * v2;
    s3 += gradient * v3;
    g0[c] += w0 * gradient;
    g1[c] += w1 * gradient;
    g2[c] += w2 * gradient;
    g3[c] += w3 * gradient;
    row[c] = w0 * v0 + w1 * v1 + w2 * v2 + w3 * v3;
  }
  sums[0] = s0;
  sums[1] = s1;
  sums[2] = s2;
  sums[3] = s3;
}

// The backward pass of one tap inside the map; `sums` are those of its corners,
// `grads` its pixels of gradients.input.
template <typename S, typename T, typename Channels>
DCN_INLINE void tap_backward(
    const Corners<S, T>& corners,
    Channels channels,
    const Im2colGradients<T>& gradients,
    T* const (&grads)[4],
    T* row,
    T (&sums)[4]) {
  const bool wants_input = gradients.input.data != nullptr;
  const auto& weights = corners.masked_weight;
  const bool distinct_corners = weights[0] != T(0) && weights[1] != T(0) &&
      weights[2] != T(0) && weights[3] != T(0);
  if (std::is_same_v<Channels, ContiguousChannels> && wants_input &&
      gradients.wants_taps && gradients.wants_columns && distinct_corners &&
      gradients.input.channel_stride == 1) {
    fused_tap_backward(corners, grads, channels.count(), row, sums);
    return;
  }
  if (gradients.wants_taps) {
    dot_corners(corners, row, channels, sums);
  }
  for (int k = 0; wants_input && k < 4; ++k) {
    // A corner has no weight at integer coordinates and outside the map.
    if (weights[k] != T(0)) {
      scatter_corner(
          grads[k],
          weights[k],
          row,
          gradients.input.channel_stride,
          channels.count());
    }
  }
  if (gradients.wants_columns) {
    interpolate(corners, channels, row);
  }
}

template <typename S, typename T, int64_t kCount>
DCN_INLINE void tap_backward(
    const Corners<S, T>& corners,
    FixedChannels<kCount> channels,
    const Im2colGradients<T>& gradients,
    T* const (&grads)[4],
    T* row,
    T (&sums)[4]) {
  const auto gradient = load_vector<T, kCount>(row);
  const auto& weights = corners.masked_weight;
  for (int k = 0; gradients.wants_taps && k < 4; ++k) {
    const auto pixel = load_vector<T, kCount>(corners.pixel[k]);
    sums[k] = sum_of<T, kCount>(gradient * pixel);
  }
  for (int k = 0; gradients.input.data != nullptr && k < 4; ++k) {
    if (weights[k] == T(0)) {
      continue;
    }
    if (gradients.input.channel_stride == 1) {
      auto pixel = load_vector<T, kCount>(grads[k]);
      pixel += weights[k] * gradient;
      store_vector<T, kCount>(pixel, grads[k]);
    } else {
      scatter_corner(
          grads[k], weights[k], row, gradients.input.channel_stride, kCount);
    }
  }
  if (gradients.wants_columns) {
    interpolate(corners, channels, row);
  }
}

template <typename S, typename T, typename C>
DCN_INLINE void deform_im2col_body(
    const FeatureMapView<const S>& map,
    const SamplingPlan<T>& plan,
    int64_t first_tap,
    const Im2colTile<C>& tile) {
  const auto taps = plan.taps();
  const Im2colTile<C> columns = tile;
  const S* const data = map.data;
  with_channels(columns.channels, map.channel_stride, [=](auto channels) {
    for (int64_t p = 0; p < columns.positions; ++p) {
      C* row = columns.data + p * columns.stride;
      int64_t index = taps.index(first_tap, p);
      for (int64_t k = 0; k < columns.taps; ++k) {
        if (taps.inside[index] != 0) {
          interpolate(load_corners(data, taps, index), channels, row);
        } else {
          const T outside = taps.masked_weights[index];
          std::fill_n(row, channels.count(), round_to<C>(outside));
        }
        row += channels.count();
        index += taps.tap_stride;
      }
    }
  });
}

template <typename S, typename T>
DCN_INLINE void deform_im2col_backward_body(
    const FeatureMapView<const S>& map,
    const SamplingPlan<T>& plan,
    const Im2colTile<T>& tile,
    const Im2colGradients<T>& wanted) {
  const auto taps = plan.taps();
  const Im2colTile<T> columns = tile;
  const Im2colGradients<T> gradients = wanted;
  const int64_t* const grad_pixels = gradients.plan->taps().pixels;
  const S* const data = map.data;
  with_channels(columns.channels, map.channel_stride, [=](auto channels) {
    for (int64_t p = 0; p < columns.positions; ++p) {
      T* row = columns.data + p * columns.stride;
      int64_t index = taps.index(0, p);
      for (int64_t k = 0; k < columns.taps; ++k) {
        T sums[4] = {};
        if (taps.inside[index] != 0) {
          T* grads[4] = {};
          for (int i = 0; gradients.input.data != nullptr && i < 4; ++i) {
            grads[i] = gradients.input.data +
                grad_pixels[index + i * taps.corner_stride];
          }
          tap_backward(
              load_corners(data, taps, index),
              channels,
              gradients,
              grads,
              row,
              sums);
        } else if (gradients.wants_columns) {
          std::fill_n(row, channels.count(), taps.masked_weights[index]);
        }
        for (int i = 0; gradients.wants_taps && i < 4; ++i) {
          taps.corner_sums[index + i * taps.corner_stride] = sums[i];
        }
        row += channels.count();
        index += taps.tap_stride;
      }
    }
  });
}

} // namespace

// One function per combination of dtypes, each cloned per instruction set.
#define DCN_DEFINE_IM2COL(S, T, C)                     \
  template <>                                          \
  DCN_VECTOR_CLONES void deform_im2col(                \
      const FeatureMapView<const S>& map,              \
      const SamplingPlan<T>& plan,                     \
      int64_t first_tap,                               \
      const Im2colTile<C>& columns) {                  \
    deform_im2col_body(map, plan, first_tap, columns); \
  }

DCN_DEFINE_IM2COL(double, double, double)
DCN_DEFINE_IM2COL(float, float, float)
DCN_DEFINE_IM2COL(float, float, c10::BFloat16)
DCN_DEFINE_IM2COL(c10::Half, float, float)
DCN_DEFINE_IM2COL(c10::BFloat16, float, float)
DCN_DEFINE_IM2COL(c10::BFloat16, float, c10::BFloat16)
#undef DCN_DEFINE_IM2COL

#define DCN_DEFINE_BACKWARD(S, T)                               \
  template <>                                                   \
  DCN_VECTOR_CLONES void deform_im2col_backward(                \
      const FeatureMapView<const S>& map,                       \
      const SamplingPlan<T>& plan,                              \
      const Im2colTile<T>& columns,                             \
      const Im2colGradients<T>& gradients) {                    \
    deform_im2col_backward_body(map, plan, columns, gradients); \
  }

DCN_DEFINE_BACKWARD(double, double)
DCN_DEFINE_BACKWARD(float, float)
DCN_DEFINE_BACKWARD(c10::Half, float)
DCN_DEFINE_BACKWARD(c10::BFloat16, float)
#undef DCN_DEFINE_BACKWARD

} // namespace dcn::cpu
