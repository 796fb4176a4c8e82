// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "cpu/conv/deform_im2col.h"

#include <algorithm>

#include "cpu/conv/rounding.h"

namespace dcn {
namespace {

// A channel stride of 1 known to the compiler, so that it can vectorise.
struct UnitStride {
  constexpr operator int64_t() const {
    return 1;
  }
};

template <typename S, typename T>
struct Corners {
  const S* pixel[4];
  T share[4];
};

template <typename S, typename T>
DCN_INLINE Corners<S, T> corners_of(
    const MapView<const S>& map,
    const DeformTap<T>& tap) {
  Corners<S, T> corners;
  for (int k = 0; k < 4; ++k) {
    corners.pixel[k] = map.pixel(tap.y.at[k >> 1], tap.x.at[k & 1]);
    corners.share[k] = tap.share(k);
  }
  return corners;
}

template <typename S, typename T, typename C, typename Stride>
DCN_INLINE void sample(
    const Corners<S, T>& from,
    Stride stride,
    int64_t channels,
    C* row) {
  const S *p0 = from.pixel[0], *p1 = from.pixel[1];
  const S *p2 = from.pixel[2], *p3 = from.pixel[3];
  const T w0 = from.share[0], w1 = from.share[1];
  const T w2 = from.share[2], w3 = from.share[3];
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t i = c * stride;
    row[c] = rounded<C>(
        w0 * static_cast<T>(p0[i]) + w1 * static_cast<T>(p1[i]) +
        w2 * static_cast<T>(p2[i]) + w3 * static_cast<T>(p3[i]));
  }
}

// Sum over channels of gradient * pixel, for each of the four corners.
template <typename S, typename T, typename Stride>
DCN_INLINE void correlate(
    const Corners<S, T>& with,
    const T* gradient,
    Stride stride,
    int64_t channels,
    T (&sums)[4]) {
  const S *p0 = with.pixel[0], *p1 = with.pixel[1];
  const S *p2 = with.pixel[2], *p3 = with.pixel[3];
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
    const MapView<T>& input,
    int64_t channels) {
  for (int k = 0; k < 4; ++k) {
    const T weight = tap.share(k);
    // Half of the corners at integer coordinates, and those off the map.
    if (weight == T(0)) {
      continue;
    }
    T* pixel = input.pixel(tap.y.at[k >> 1], tap.x.at[k & 1]);
    if (input.channel_stride == 1) {
      scatter_corner(pixel, weight, gradient, UnitStride{}, channels);
    } else {
      scatter_corner(pixel, weight, gradient, input.channel_stride, channels);
    }
  }
}

// Everything that training asks of a tap, in one pass over its channels. The
// four pixels must be different ones.
template <typename S, typename T>
DCN_INLINE void backward_whole_row(
    const Corners<S, T>& from,
    T* const (&grads)[4],
    int64_t channels,
    T* row,
    T (&sums)[4]) {
  const S *p0 = from.pixel[0], *p1 = from.pixel[1];
  const S *p2 = from.pixel[2], *p3 = from.pixel[3];
  const T w0 = from.share[0], w1 = from.share[1];
  const T w2 = from.share[2], w3 = from.share[3];
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
DCN_INLINE void backward_row(
    const MapView<const S>& map,
    Stride stride,
    const DeformTap<T>& tap,
    int64_t channels,
    const ColumnGradients<T>& gradients,
    T* row,
    T* out) {
  const auto corners = corners_of(map, tap);
  T sums[4];
  const auto& input = gradients.input;
  const bool all_wanted =
      out != nullptr && input.data != nullptr && gradients.wants_columns;
  const bool all_weigh = corners.share[0] != T(0) && corners.share[1] != T(0) &&
      corners.share[2] != T(0) && corners.share[3] != T(0);
  if (std::is_same_v<Stride, UnitStride> && all_wanted && all_weigh &&
      input.channel_stride == 1) {
    T* grads[4];
    for (int k = 0; k < 4; ++k) {
      grads[k] = input.pixel(tap.y.at[k >> 1], tap.x.at[k & 1]);
    }
    backward_whole_row(corners, grads, channels, row, sums);
    tap_gradient(tap, sums, out);
    return;
  }
  if (out != nullptr) {
    correlate(corners, row, stride, channels, sums);
    tap_gradient(tap, sums, out);
  }
  if (gradients.input.data != nullptr) {
    scatter(tap, row, gradients.input, channels);
  }
  if (gradients.wants_columns) {
    sample(corners, stride, channels, row);
  }
}

template <typename S, typename T, typename C>
DCN_INLINE void gather_columns_body(
    const MapView<const S>& map,
    const DeformTap<T>* taps,
    int64_t tap_stride,
    const Columns<C>& columns) {
  for (int64_t p = 0; p < columns.positions; ++p) {
    C* row = columns.data + p * columns.stride;
    const DeformTap<T>* tap = taps + p * tap_stride;
    for (int64_t k = 0; k < columns.taps; ++k, ++tap, row += columns.channels) {
      if (tap->state != TapState::kInside) {
        std::fill_n(
            row, columns.channels, rounded<C>(tap->value_without_pixels()));
      } else if (map.channel_stride == 1) {
        sample(corners_of(map, *tap), UnitStride{}, columns.channels, row);
      } else {
        sample(
            corners_of(map, *tap), map.channel_stride, columns.channels, row);
      }
    }
  }
}

template <typename S, typename T>
DCN_INLINE void backward_columns_body(
    const MapView<const S>& map,
    const DeformTap<T>* taps,
    const Columns<T>& columns,
    const ColumnGradients<T>& gradients) {
  for (int64_t p = 0; p < columns.positions; ++p) {
    for (int64_t k = 0; k < columns.taps; ++k) {
      const int64_t r = p * columns.taps + k;
      const auto& tap = taps[r];
      T* row = columns.data + p * columns.stride + k * columns.channels;
      T* out = gradients.taps == nullptr ? nullptr : gradients.taps + 3 * r;
      if (tap.state != TapState::kInside) {
        if (out != nullptr) {
          const T nothing[4] = {};
          tap_gradient(tap, nothing, out);
        }
        if (gradients.wants_columns) {
          std::fill_n(row, columns.channels, tap.value_without_pixels());
        }
      } else if (map.channel_stride == 1) {
        backward_row(
            map, UnitStride{}, tap, columns.channels, gradients, row, out);
      } else {
        backward_row(
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
void locate_taps(
    const TapSource& source,
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

template void locate_taps(
    const TapSource&,
    int64_t,
    int64_t,
    int64_t,
    int64_t,
    DeformTap<float>*);
template void locate_taps(
    const TapSource&,
    int64_t,
    int64_t,
    int64_t,
    int64_t,
    DeformTap<double>*);

// One function per pair of dtypes, each cloned per instruction set.
#define DCN_DEFINE_GATHER(S, T, C)                       \
  template <>                                            \
  DCN_VECTOR_CLONES void gather_columns(                 \
      const MapView<const S>& map,                       \
      const DeformTap<T>* taps,                          \
      int64_t tap_stride,                                \
      const Columns<C>& columns) {                       \
    gather_columns_body(map, taps, tap_stride, columns); \
  }

DCN_DEFINE_GATHER(double, double, double)
DCN_DEFINE_GATHER(float, float, float)
DCN_DEFINE_GATHER(float, float, c10::BFloat16)
DCN_DEFINE_GATHER(c10::Half, float, float)
DCN_DEFINE_GATHER(c10::BFloat16, float, float)
DCN_DEFINE_GATHER(c10::BFloat16, float, c10::BFloat16)
#undef DCN_DEFINE_GATHER

#define DCN_DEFINE_BACKWARD(S, T)                         \
  template <>                                             \
  DCN_VECTOR_CLONES void backward_columns(                \
      const MapView<const S>& map,                        \
      const DeformTap<T>* taps,                           \
      const Columns<T>& columns,                          \
      const ColumnGradients<T>& gradients) {              \
    backward_columns_body(map, taps, columns, gradients); \
  }

DCN_DEFINE_BACKWARD(double, double)
DCN_DEFINE_BACKWARD(float, float)
DCN_DEFINE_BACKWARD(c10::Half, float)
DCN_DEFINE_BACKWARD(c10::BFloat16, float)
#undef DCN_DEFINE_BACKWARD

} // namespace dcn
