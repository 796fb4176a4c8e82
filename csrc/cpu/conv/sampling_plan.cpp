// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "cpu/conv/sampling_plan.h"

#include <algorithm>

// The conditions of a tap are vector code without branches. GCC's jump
// threading splits their combinations, which makes the code half as long again.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-thread-jumps")
#endif

namespace dcn::cpu {
namespace {

// One tap along the positions.
template <typename T>
struct TapArrays {
  int64_t* corners;
  T* masked_weight[4];
  int64_t row_stride;
  int64_t column_stride;
};

template <typename T>
DCN_INLINE void compute_tap_body(
    TapInputs<T> from,
    const TapArrays<T>& tap,
    int64_t count) {
  const int64_t row = tap.row_stride << kCornerShift;
  const int64_t column = tap.column_stride << kCornerShift;
  int64_t* corners = tap.corners;
  T *w0 = tap.masked_weight[0], *w1 = tap.masked_weight[1];
  T *w2 = tap.masked_weight[2], *w3 = tap.masked_weight[3];
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const DeformTap<T> at = from.locate(i);
    const bool inside = at.state == TapState::kInside;
    const T weight = at.masked_weight(0);
    const T outside = at.value_outside();
    w0[i] = inside ? weight : outside;
    w1[i] = at.masked_weight(1);
    w2[i] = at.masked_weight(2);
    w3[i] = at.masked_weight(3);
    // Of type int, as the coordinates: vector code for 64 bits is slower.
    const int bits = (at.x.pixel[1] - at.x.pixel[0]) * int{kHasRight} +
        (at.y.pixel[1] - at.y.pixel[0]) * int{kHasBelow} +
        (inside ? int{kReadsMap} : 0);
    corners[i] = at.y.pixel[0] * row + at.x.pixel[0] * column + bits;
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
      max_positions_((max_positions + PlannedTaps<T>::kAhead + 15) / 16 * 16),
      size_(source.geometry.taps() * max_positions_),
      corners_(make_buffer<int64_t>(size_)),
      masked_weights_(make_buffer<T>(4 * size_)),
      corner_sums_(make_buffer<T>(4 * size_)),
      offsets_(make_buffer<T>(3 * size_)),
      ones_(make_buffer<T>(max_positions_)),
      inputs_(source.geometry.taps()),
      grid_(
          make_buffer<T>(
              (source.geometry.kernel_h + source.geometry.kernel_w) *
              max_positions_)) {
  std::fill_n(ones_.get(), max_positions_, T(1));
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
const T* SamplingPlan<T>::positions(
    const AnyDtypeView& view,
    int64_t channel,
    T* buffer) const {
  const int64_t width = source_.geometry.out_w;
  const T* values =
      view.contiguous_positions<T>(image_, channel, begin_, width);
  if (values != nullptr) {
    return values;
  }
  view.load_positions(image_, channel, begin_, begin_ + count_, width, buffer);
  return buffer;
}

template <typename T>
void SamplingPlan<T>::compute(
    int64_t offset_group,
    int64_t row_stride,
    int64_t column_stride,
    const Part& next) {
  const auto& g = source_.geometry;
  const auto& offset = source_.offset;
  const auto& mask = source_.mask;
  const T* grid = grid_.get();
  for (int tap = 0; tap < g.taps(); ++tap) {
    const int64_t channel = offset_group * g.taps() + tap;
    const int64_t first = tap * max_positions_;
    T* buffer = offsets_.get() + first;
    inputs_[tap] = {
        grid + tap / g.kernel_w * max_positions_,
        grid + (g.kernel_h + tap % g.kernel_w) * max_positions_,
        positions(offset, 2 * channel, buffer),
        positions(offset, 2 * channel + 1, buffer + size_),
        mask.defined() ? positions(mask, channel, buffer + 2 * size_)
                       : ones_.get(),
        g.in_h,
        g.in_w};
    // Not in a function of its own: GCC removes calls that only prefetch.
    const int64_t ahead = next.offset_group * g.taps() + tap;
    const int64_t begin = next.begin, end = next.end;
    offset.prefetch_positions(image_, 2 * ahead, begin, end, g.out_w);
    offset.prefetch_positions(image_, 2 * ahead + 1, begin, end, g.out_w);
    if (mask.defined()) {
      mask.prefetch_positions(image_, ahead, begin, end, g.out_w);
    }
    TapArrays<T> arrays{corners_.get() + first, {}, row_stride, column_stride};
    for (int k = 0; k < 4; ++k) {
      arrays.masked_weight[k] = masked_weights_.get() + k * size_ + first;
    }
    compute_tap(inputs_[tap], arrays, count_);
    std::fill_n(arrays.corners + count_, PlannedTaps<T>::kAhead, 0);
  }
}

template <typename T>
void SamplingPlan<T>::compute_gradients(T* out, int64_t out_stride) const {
  for (int tap = 0; tap < source_.geometry.taps(); ++tap) {
    compute_gradients_of_tap<T>(
        inputs_[tap],
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
