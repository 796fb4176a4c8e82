// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "cpu/conv/sampling_plan.h"

#include <algorithm>

namespace dcn::cpu {
namespace {

// One tap along the positions.
template <typename T>
struct TapArrays {
  int* inside;
  int64_t* pixel[4];
  T* masked_weight[4];
  int64_t row_stride;
  int64_t column_stride;
};

template <typename T>
DCN_INLINE void compute_tap_body(
    TapInputs<T> from,
    const TapArrays<T>& tap,
    int64_t count) {
  const int64_t row_stride = tap.row_stride, column_stride = tap.column_stride;
  int* inside = tap.inside;
  int64_t *p0 = tap.pixel[0], *p1 = tap.pixel[1];
  int64_t *p2 = tap.pixel[2], *p3 = tap.pixel[3];
  T *w0 = tap.masked_weight[0], *w1 = tap.masked_weight[1];
  T *w2 = tap.masked_weight[2], *w3 = tap.masked_weight[3];
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const DeformTap<T> at = from.locate(i);
    const T weight = at.masked_weight(0);
    const T outside = at.value_outside();
    inside[i] = at.state == TapState::kInside ? 1 : 0;
    w0[i] = at.state == TapState::kInside ? weight : outside;
    w1[i] = at.masked_weight(1);
    w2[i] = at.masked_weight(2);
    w3[i] = at.masked_weight(3);
    const int64_t y0 = at.y.pixel[0] * row_stride;
    const int64_t y1 = at.y.pixel[1] * row_stride;
    const int64_t x0 = at.x.pixel[0] * column_stride;
    const int64_t x1 = at.x.pixel[1] * column_stride;
    p0[i] = y0 + x0;
    p1[i] = y0 + x1;
    p2[i] = y1 + x0;
    p3[i] = y1 + x1;
  }
}

template <typename T>
DCN_INLINE void compute_gradients_body(
    TapInputs<T> from,
    const T* sums,
    int64_t sums_stride,
    T* out,
    int64_t out_stride,
    int64_t count) {
  const T *s0 = sums, *s1 = s0 + sums_stride;
  const T *s2 = s1 + sums_stride, *s3 = s2 + sums_stride;
  T *dy = out, *dx = dy + out_stride, *mask = dx + out_stride;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const T corner_sums[4] = {s0[i], s1[i], s2[i], s3[i]};
    T gradient[3];
    tap_gradients(from.locate(i), corner_sums, gradient);
    dy[i] = gradient[0];
    dx[i] = gradient[1];
    mask[i] = gradient[2];
  }
}

template <typename T>
void compute_tap(
    const TapInputs<T>& from,
    const TapArrays<T>& tap,
    int64_t count);

template <typename T>
void compute_gradients_of_tap(
    const TapInputs<T>& from,
    const T* sums,
    int64_t sums_stride,
    T* out,
    int64_t out_stride,
    int64_t count);

#define DCN_DEFINE_PLAN(T)                                                   \
  template <>                                                                \
  DCN_VECTOR_CLONES void compute_tap(                                        \
      const TapInputs<T>& from, const TapArrays<T>& tap, int64_t count) {    \
    compute_tap_body(from, tap, count);                                      \
  }                                                                          \
  template <>                                                                \
  DCN_VECTOR_CLONES void compute_gradients_of_tap(                           \
      const TapInputs<T>& from,                                              \
      const T* sums,                                                         \
      int64_t sums_stride,                                                   \
      T* out,                                                                \
      int64_t out_stride,                                                    \
      int64_t count) {                                                       \
    compute_gradients_body(from, sums, sums_stride, out, out_stride, count); \
  }

DCN_DEFINE_PLAN(float)
DCN_DEFINE_PLAN(double)
#undef DCN_DEFINE_PLAN

} // namespace

template <typename T>
SamplingPlan<T>::SamplingPlan(const ConvOffsets& source, int64_t max_positions)
    : source_(source),
      max_positions_((max_positions + 15) / 16 * 16),
      size_(source.geometry.taps() * max_positions_),
      inside_(make_buffer<int>(size_)),
      pixels_(make_buffer<int64_t>(4 * size_)),
      masked_weights_(make_buffer<T>(4 * size_)),
      corner_sums_(make_buffer<T>(4 * size_)),
      offsets_(make_buffer<T>(3 * size_)),
      grid_(
          make_buffer<T>(
              (source.geometry.kernel_h + source.geometry.kernel_w) *
              max_positions_)) {
  if (!source.mask.defined()) {
    std::fill_n(offsets_.get() + 2 * size_, size_, T(1));
  }
}

template <typename T>
void SamplingPlan<T>::select(int64_t image, int64_t begin, int64_t end) {
  const auto& g = source_.geometry;
  image_ = image;
  begin_ = begin;
  count_ = end - begin;
  int y = static_cast<int>(begin / g.out_w);
  int x = static_cast<int>(begin % g.out_w);
  for (int64_t i = 0; i < count_; ++i) {
    T* at = grid_.get() + i;
    for (int k = 0; k < g.kernel_h; ++k, at += max_positions_) {
      *at = static_cast<T>(
          grid_position(y, g.stride_h, g.pad_h, k, g.dilation_h));
    }
    for (int k = 0; k < g.kernel_w; ++k, at += max_positions_) {
      *at = static_cast<T>(
          grid_position(x, g.stride_w, g.pad_w, k, g.dilation_w));
    }
    if (++x == g.out_w) {
      x = 0;
      ++y;
    }
  }
}

template <typename T>
TapInputs<T> SamplingPlan<T>::inputs(int64_t tap) const {
  const auto& g = source_.geometry;
  const T* grid = grid_.get();
  const T* dy = offsets_.get() + tap * max_positions_;
  return {
      grid + tap / g.kernel_w * max_positions_,
      grid + (g.kernel_h + tap % g.kernel_w) * max_positions_,
      dy,
      dy + size_,
      dy + 2 * size_,
      g.in_h,
      g.in_w};
}

template <typename T>
void SamplingPlan<T>::compute(
    int64_t offset_group,
    int64_t row_stride,
    int64_t column_stride) {
  const auto& g = source_.geometry;
  const int64_t end = begin_ + count_;
  for (int tap = 0; tap < g.taps(); ++tap) {
    const int64_t channel = offset_group * g.taps() + tap;
    const int64_t first = tap * max_positions_;
    T* dy = offsets_.get() + first;
    const auto& offset = source_.offset;
    offset.load_positions(image_, 2 * channel, begin_, end, g.out_w, dy);
    offset.load_positions(
        image_, 2 * channel + 1, begin_, end, g.out_w, dy + size_);
    if (source_.mask.defined()) {
      source_.mask.load_positions(
          image_, channel, begin_, end, g.out_w, dy + 2 * size_);
    }
    if (offset_group + 1 < source_.offset_groups) {
      // The rows of a tap are far apart in memory.
      const int64_t next = channel + g.taps();
      offset.prefetch_positions(image_, 2 * next, begin_, end, g.out_w);
      offset.prefetch_positions(image_, 2 * next + 1, begin_, end, g.out_w);
      if (source_.mask.defined()) {
        source_.mask.prefetch_positions(image_, next, begin_, end, g.out_w);
      }
    }
    TapArrays<T> arrays{
        inside_.get() + first, {}, {}, row_stride, column_stride};
    for (int k = 0; k < 4; ++k) {
      arrays.pixel[k] = pixels_.get() + k * size_ + first;
      arrays.masked_weight[k] = masked_weights_.get() + k * size_ + first;
    }
    compute_tap(inputs(tap), arrays, count_);
  }
}

template <typename T>
void SamplingPlan<T>::compute_gradients(T* out, int64_t out_stride) const {
  for (int tap = 0; tap < source_.geometry.taps(); ++tap) {
    compute_gradients_of_tap<T>(
        inputs(tap),
        corner_sums_.get() + tap * max_positions_,
        size_,
        out + 3 * tap * out_stride,
        out_stride,
        count_);
  }
}

template class SamplingPlan<float>;
template class SamplingPlan<double>;

} // namespace dcn::cpu
