// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "cpu/conv/deform_im2col.h"

#include <algorithm>

#include "cpu/conv/gemm.h"

namespace dcn::cpu {
namespace {

// A channel stride of 1 as a compile-time constant, for vectorization.
struct UnitStride {
  constexpr operator int64_t() const {
    return 1;
  }
};

template <typename S, typename T>
struct Corners {
  const S* pixel[4];
  T masked_weight[4];
};

template <typename S, typename T>
DCN_INLINE Corners<S, T> load_corners(
    const FeatureMapView<const S>& map,
    const DeformTap<T>& tap) {
  Corners<S, T> corners;
  for (int k = 0; k < 4; ++k) {
    corners.pixel[k] = map.pixel(tap.y.pixel[k >> 1], tap.x.pixel[k & 1]);
    corners.masked_weight[k] = tap.masked_weight(k);
  }
  return corners;
}

template <typename S, typename T, typename C, typename Stride>
DCN_INLINE void interpolate(
    const Corners<S, T>& from,
    Stride stride,
    int64_t channels,
    C* row) {
  const S *p0 = from.pixel[0], *p1 = from.pixel[1];
  const S *p2 = from.pixel[2], *p3 = from.pixel[3];
  const T w0 = from.masked_weight[0], w1 = from.masked_weight[1];
  const T w2 = from.masked_weight[2], w3 = from.masked_weight[3];
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t i = c * stride;
    row[c] = round_to<C>(
        w0 * static_cast<T>(p0[i]) + w1 * static_cast<T>(p1[i]) +
        w2 * static_cast<T>(p2[i]) + w3 * static_cast<T>(p3[i]));
  }
}

// Sum over channels of gradient * pixel, for each of the four corners.
template <typename S, typename T, typename Stride>
DCN_INLINE void dot_corners(
    const Corners<S, T>& corners,
    const T* gradient,
    Stride stride,
    int64_t channels,
    T (&sums)[4]) {
  const S *p0 = corners.pixel[0], *p1 = corners.pixel[1];
  const S *p2 = corners.pixel[2], *p3 = corners.pixel[3];
  T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t i = c * stride;
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

template <typename T, typename Stride>
DCN_INLINE void scatter_corner(
    T* pixel,
    T weight,
    const T* gradient,
    Stride stride,
    int64_t channels) {
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    pixel[c * stride] += weight * gradient[c];
  }
}

template <typename T>
DCN_INLINE void scatter(
    const DeformTap<T>& tap,
    const T* gradient,
    const FeatureMapView<T>& input,
    int64_t channels) {
  for (int k = 0; k < 4; ++k) {
    const T weight = tap.masked_weight(k);
    // A corner has no weight at integer coordinates and outside the map.
    if (weight == T(0)) {
      continue;
    }
    T* pixel = input.pixel(tap.y.pixel[k >> 1], tap.x.pixel[k & 1]);
    if (input.channel_stride == 1) {
      scatter_corner(pixel, weight, gradient, UnitStride{}, channels);
    } else {
      scatter_corner(pixel, weight, gradient, input.channel_stride, channels);
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

template <typename S, typename T, typename Stride>
DCN_INLINE void tap_backward(
    const FeatureMapView<const S>& map,
    Stride stride,
    const DeformTap<T>& tap,
    int64_t channels,
    const Im2colGradients<T>& gradients,
    T* row,
    T* out) {
  const auto corners = load_corners(map, tap);
  T sums[4];
  const auto& input = gradients.input;
  const bool all_wanted =
      out != nullptr && input.data != nullptr && gradients.wants_columns;
  const bool distinct_corners = corners.masked_weight[0] != T(0) &&
      corners.masked_weight[1] != T(0) && corners.masked_weight[2] != T(0) &&
      corners.masked_weight[3] != T(0);
  if (std::is_same_v<Stride, UnitStride> && all_wanted && distinct_corners &&
      input.channel_stride == 1) {
    T* grads[4];
    for (int k = 0; k < 4; ++k) {
      grads[k] = input.pixel(tap.y.pixel[k >> 1], tap.x.pixel[k & 1]);
    }
    fused_tap_backward(corners, grads, channels, row, sums);
    tap_gradients(tap, sums, out);
    return;
  }
  if (out != nullptr) {
    dot_corners(corners, row, stride, channels, sums);
    tap_gradients(tap, sums, out);
  }
  if (gradients.input.data != nullptr) {
    scatter(tap, row, gradients.input, channels);
  }
  if (gradients.wants_columns) {
    interpolate(corners, stride, channels, row);
  }
}

template <typename S, typename T, typename C>
DCN_INLINE void deform_im2col_body(
    const FeatureMapView<const S>& map,
    const DeformTap<T>* taps,
    int64_t tap_stride,
    const Im2colTile<C>& columns) {
  for (int64_t p = 0; p < columns.positions; ++p) {
    C* row = columns.data + p * columns.stride;
    const DeformTap<T>* tap = taps + p * tap_stride;
    for (int64_t k = 0; k < columns.taps; ++k, ++tap, row += columns.channels) {
      if (tap->state != TapState::kInside) {
        std::fill_n(row, columns.channels, round_to<C>(tap->value_outside()));
      } else if (map.channel_stride == 1) {
        interpolate(
            load_corners(map, *tap), UnitStride{}, columns.channels, row);
      } else {
        interpolate(
            load_corners(map, *tap), map.channel_stride, columns.channels, row);
      }
    }
  }
}

template <typename S, typename T>
DCN_INLINE void deform_im2col_backward_body(
    const FeatureMapView<const S>& map,
    const DeformTap<T>* taps,
    const Im2colTile<T>& columns,
    const Im2colGradients<T>& gradients) {
  for (int64_t p = 0; p < columns.positions; ++p) {
    for (int64_t k = 0; k < columns.taps; ++k) {
      const int64_t r = p * columns.taps + k;
      const auto& tap = taps[r];
      T* row = columns.data + p * columns.stride + k * columns.channels;
      T* out = gradients.taps == nullptr ? nullptr : gradients.taps + 3 * r;
      if (tap.state != TapState::kInside) {
        if (out != nullptr) {
          const T zeros[4] = {};
          tap_gradients(tap, zeros, out);
        }
        if (gradients.wants_columns) {
          std::fill_n(row, columns.channels, tap.value_outside());
        }
      } else if (map.channel_stride == 1) {
        tap_backward(
            map, UnitStride{}, tap, columns.channels, gradients, row, out);
      } else {
        tap_backward(
            map,
            map.channel_stride,
            tap,
            columns.channels,
            gradients,
            row,
            out);
      }
    }
  }
}

} // namespace

template <typename T>
void compute_taps(
    const ConvOffsets& source,
    int64_t image,
    int64_t offset_group,
    int64_t begin,
    int64_t end,
    DeformTap<T>* taps) {
  const auto& g = source.geometry;
  int y = static_cast<int>(begin / g.out_w);
  int x = static_cast<int>(begin % g.out_w);
  for (int64_t position = begin; position < end; ++position) {
    for (int ky = 0; ky < g.kernel_h; ++ky) {
      for (int kx = 0; kx < g.kernel_w; ++kx) {
        *taps++ = source.locate<T>(image, offset_group, y, x, ky, kx);
      }
    }
    if (++x == g.out_w) {
      x = 0;
      ++y;
    }
  }
}

template void compute_taps(
    const ConvOffsets&,
    int64_t,
    int64_t,
    int64_t,
    int64_t,
    DeformTap<float>*);
template void compute_taps(
    const ConvOffsets&,
    int64_t,
    int64_t,
    int64_t,
    int64_t,
    DeformTap<double>*);

// One function per combination of dtypes, each cloned per instruction set.
#define DCN_DEFINE_IM2COL(S, T, C)                      \
  template <>                                           \
  DCN_VECTOR_CLONES void deform_im2col(                 \
      const FeatureMapView<const S>& map,               \
      const DeformTap<T>* taps,                         \
      int64_t tap_stride,                               \
      const Im2colTile<C>& columns) {                   \
    deform_im2col_body(map, taps, tap_stride, columns); \
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
      const DeformTap<T>* taps,                                 \
      const Im2colTile<T>& columns,                             \
      const Im2colGradients<T>& gradients) {                    \
    deform_im2col_backward_body(map, taps, columns, gradients); \
  }

DCN_DEFINE_BACKWARD(double, double)
DCN_DEFINE_BACKWARD(float, float)
DCN_DEFINE_BACKWARD(c10::Half, float)
DCN_DEFINE_BACKWARD(c10::BFloat16, float)
#undef DCN_DEFINE_BACKWARD

} // namespace dcn::cpu
