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

// S is const where the map is read only.
template <typename S, typename T>
struct Corners {
  S* pixel[4];
  T masked_weight[4];
};

template <typename S, typename T>
DCN_INLINE Corners<S, T> load_corners(
    const FeatureMapView<S>& map,
    const PlannedTaps<T>& taps,
    int64_t index) {
  Corners<S, T> corners;
  decode_corners(taps.corners[index], map, corners.pixel);
  for (int k = 0; k < 4; ++k) {
    corners.masked_weight[k] =
        taps.masked_weights[index + k * taps.corner_stride];
  }
  return corners;
}

// Prefetches the corners of a tap, of slices whose channels share cache lines.
// They may lie after the map, which a prefetch allows.
template <typename S, typename Channels>
DCN_INLINE void prefetch_corners(int64_t, const FeatureMapView<S>&, Channels) {}
template <typename S, int64_t kCount>
DCN_INLINE void prefetch_corners(
    int64_t corners,
    const FeatureMapView<S>& map,
    FixedChannels<kCount>) {
  S* const first = map.data + (corners >> kCornerShift);
  DCN_PREFETCH(first);
  DCN_PREFETCH(first + map.row_stride);
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

template <typename T, int64_t kCount>
DCN_INLINE void scatter_corner(
    T* pixel,
    T weight,
    const T* gradient,
    int64_t stride,
    FixedChannels<kCount>) {
  if (stride == 1) {
    auto sum = load_vector<T, kCount>(pixel);
    sum += weight * load_vector<T, kCount>(gradient);
    store_vector<T, kCount>(sum, pixel);
  } else {
    scatter_corner(pixel, weight, gradient, stride, kCount);
  }
}

template <typename Channels>
DCN_INLINE int64_t scatter_count(Channels channels) {
  return channels.count();
}
template <int64_t kCount>
DCN_INLINE FixedChannels<kCount> scatter_count(FixedChannels<kCount> channels) {
  return channels;
}

// `channels` is a number or FixedChannels.
template <typename T, typename Channels>
DCN_INLINE void scatter_corners(
    T* const (&pixels)[4],
    const T (&weights)[4],
    const T* gradient,
    int64_t stride,
    Channels channels) {
  for (int k = 0; k < 4; ++k) {
    // A corner has no weight at integer coordinates and outside the map.
    if (weights[k] != T(0)) {
      scatter_corner(pixels[k], weights[k], gradient, stride, channels);
    }
  }
}

// One tap of some contiguous channels in one pass: gradients of offset and
// mask, with kScatter that of the input, with kColumn the column. Vectors and
// not loops, so that the sums are the same whatever else is computed.
template <bool kScatter, bool kColumn, typename S, typename T>
struct FusedTap {
  const Corners<S, T>& from;
  T* const (&grads)[4]; // if kScatter
  const T* gradient;
  T* column; // if kColumn

  // Channels [c, c + kCount), or `count` of them if it is given.
  template <int64_t kCount, typename... Count>
  DCN_INLINE void run(
      int64_t c,
      typename VectorOf<T, kCount>::Type (&sums)[4],
      Count... count) const {
    const auto g = load_vector<T, kCount>(gradient + c, count...);
    auto value = g;
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const T weight = from.masked_weight[k];
      const auto pixel = load_vector<T, kCount>(from.pixel[k] + c, count...);
      sums[k] += g * pixel;
      value = k == 0 ? weight * pixel : value + weight * pixel;
      if constexpr (kScatter) {
        auto grad = load_vector<T, kCount>(grads[k] + c, count...);
        grad += weight * g;
        store_vector<T, kCount>(grad, grads[k] + c, count...);
      }
    }
    if constexpr (kColumn) {
      store_vector<T, kCount>(value, column + c, count...);
    }
  }

  DCN_INLINE void run_all(int64_t channels, T (&sums)[4]) const {
    constexpr int64_t kFew = 4;
    typename VectorOf<T, 16>::Type vectors[4] = {};
    typename VectorOf<T, kFew>::Type rest[4] = {};
    int64_t c = 0;
    for (; c + 16 <= channels; c += 16) {
      run<16>(c, vectors);
    }
    for (; c + kFew <= channels; c += kFew) {
      run<kFew>(c, rest);
    }
    if (c < channels) {
      run<kFew>(c, rest, channels - c);
    }
    for (int k = 0; k < 4; ++k) {
      sums[k] = sum_of<T, 16>(vectors[k]) + sum_of<T, kFew>(rest[k]);
    }
  }
};

// Whether the corners are four pixels of the map: one without weight may be
// any.
template <typename T>
DCN_INLINE bool are_distinct(const T (&weights)[4]) {
  return weights[0] != T(0) && weights[1] != T(0) && weights[2] != T(0) &&
      weights[3] != T(0);
}

// `column` is null if it is not wanted.
template <bool kScatter, typename S, typename T>
DCN_INLINE void fused_tap_backward(
    const Corners<S, T>& corners,
    T* const (&grads)[4],
    int64_t channels,
    const T* gradient,
    T* column,
    T (&sums)[4]) {
  if (column != nullptr) {
    FusedTap<kScatter, true, S, T>{corners, grads, gradient, column}.run_all(
        channels, sums);
  } else {
    FusedTap<kScatter, false, S, T>{corners, grads, gradient, column}.run_all(
        channels, sums);
  }
}

// The backward pass of one tap inside the map; `sums` are those of its corners,
// `grads` its pixels of gradients.input.
template <typename S, typename T, typename Channels>
DCN_INLINE void tap_backward(
    const Corners<S, T>& corners,
    Channels channels,
    const Im2colGradients<T>& gradients,
    T* const (&grads)[4],
    const T* gradient,
    T* column,
    T (&sums)[4]) {
  const auto& weights = corners.masked_weight;
  const int64_t stride = gradients.input.channel_stride;
  const bool wants_input = gradients.input.data != nullptr;
  if constexpr (std::is_same_v<Channels, ContiguousChannels>) {
    if (gradients.wants_taps) {
      const int64_t count = channels.count();
      if (wants_input && are_distinct(weights) && stride == 1) {
        fused_tap_backward<true>(corners, grads, count, gradient, column, sums);
        return;
      }
      if (wants_input) {
        scatter_corners(grads, weights, gradient, stride, count);
      }
      fused_tap_backward<false>(corners, grads, count, gradient, column, sums);
      return;
    }
  }
  if (gradients.wants_taps) {
    dot_corners(corners, gradient, channels, sums);
  }
  if (wants_input) {
    scatter_corners(grads, weights, gradient, stride, channels.count());
  }
  if (column != nullptr) {
    interpolate(corners, channels, column);
  }
}

template <typename S, typename T, int64_t kCount>
DCN_INLINE void tap_backward(
    const Corners<S, T>& corners,
    FixedChannels<kCount> channels,
    const Im2colGradients<T>& gradients,
    T* const (&grads)[4],
    const T* gradient,
    T* column,
    T (&sums)[4]) {
  const auto lanes = load_vector<T, kCount>(gradient);
  for (int k = 0; gradients.wants_taps && k < 4; ++k) {
    const auto pixel = load_vector<T, kCount>(corners.pixel[k]);
    sums[k] = sum_of<T, kCount>(lanes * pixel);
  }
  if (gradients.input.data != nullptr) {
    scatter_corners(
        grads,
        corners.masked_weight,
        gradient,
        gradients.input.channel_stride,
        channels);
  }
  if (column != nullptr) {
    interpolate(corners, channels, column);
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
  const FeatureMapView<const S> view = map;
  with_channels(
      columns.channels,
      map.channel_stride,
      [=](auto channels) DCN_INLINE_LAMBDA {
        for (int64_t p = 0; p < columns.positions; ++p) {
          C* row = columns.data + p * columns.stride;
          int64_t index = taps.index(first_tap, p);
          for (int64_t k = 0; k < columns.taps; ++k) {
            prefetch_corners(taps.corners[index + taps.kAhead], view, channels);
            if (taps.reads_map(index)) {
              interpolate(load_corners(view, taps, index), channels, row);
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
  const int64_t* const grad_corners = gradients.plan->taps().corners;
  const FeatureMapView<const S> view = map;
  with_channels(
      columns.channels,
      map.channel_stride,
      [=](auto channels) DCN_INLINE_LAMBDA {
        for (int64_t p = 0; p < columns.positions; ++p) {
          const T* row = columns.data + p * columns.stride;
          T* column = gradients.columns == nullptr
              ? nullptr
              : gradients.columns + p * columns.stride;
          int64_t index = taps.index(0, p);
          for (int64_t k = 0; k < columns.taps; ++k) {
            T sums[4] = {};
            if (taps.reads_map(index)) {
              T* grads[4] = {};
              if (gradients.input.data != nullptr) {
                decode_corners(grad_corners[index], gradients.input, grads);
              }
              tap_backward(
                  load_corners(view, taps, index),
                  channels,
                  gradients,
                  grads,
                  row,
                  column,
                  sums);
            } else if (column != nullptr) {
              std::fill_n(column, channels.count(), taps.masked_weights[index]);
            }
            for (int i = 0; gradients.wants_taps && i < 4; ++i) {
              taps.corner_sums[index + i * taps.corner_stride] = sums[i];
            }
            row += channels.count();
            column += column == nullptr ? 0 : channels.count();
            index += taps.tap_stride;
          }
        }
      });
}

template <typename T>
DCN_INLINE void deform_col2im_body(
    const SamplingPlan<T>& plan,
    const Im2colTile<T>& tile,
    int64_t begin,
    int64_t end,
    const FeatureMapView<T>& input) {
  const auto taps = plan.taps();
  const Im2colTile<T> columns = tile;
  const int64_t stride = input.channel_stride;
  FeatureMapView<T> view = input;
  view.data += begin * stride;
  with_channels(end - begin, stride, [=](auto channels) DCN_INLINE_LAMBDA {
    for (int64_t p = 0; p < columns.positions; ++p) {
      const T* row = columns.data + p * columns.stride + begin;
      int64_t index = taps.index(0, p);
      for (int64_t k = 0; k < columns.taps; ++k) {
        if (taps.reads_map(index)) {
          const auto corners = load_corners(view, taps, index);
          scatter_corners(
              corners.pixel,
              corners.masked_weight,
              row,
              stride,
              scatter_count(channels));
        }
        row += columns.channels;
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

#define DCN_DEFINE_COL2IM(T)                              \
  template <>                                             \
  DCN_VECTOR_CLONES void deform_col2im(                   \
      const SamplingPlan<T>& plan,                        \
      const Im2colTile<T>& columns,                       \
      int64_t begin,                                      \
      int64_t end,                                        \
      const FeatureMapView<T>& input) {                   \
    deform_col2im_body(plan, columns, begin, end, input); \
  }

DCN_DEFINE_COL2IM(double)
DCN_DEFINE_COL2IM(float)
#undef DCN_DEFINE_COL2IM

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
