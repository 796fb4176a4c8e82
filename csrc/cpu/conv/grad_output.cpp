// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "cpu/conv/grad_output.h"

#include <algorithm>

#include "cpu/conv/rounding.h"
#include "cpu/parallel.h"
#include "ops/feature_map_view.h"

namespace dcn {
namespace {

// Positions of one task of a copy, and the channels that it copies at a time.
constexpr int64_t kPositions = 64;
constexpr int64_t kChannels = 16;
// From plane to plane, where they are read in place: products take less than
// 2^31 bytes for the rows that they have in hand.
constexpr int64_t kFarthestPlane = int64_t{1} << 20;

} // namespace

template <typename S, typename C>
GradOutput<S, C>::GradOutput(
    const at::Tensor& grad_output,
    const DeformConvShape& shape,
    bool wants_rows,
    bool wants_planes)
    : grad_(grad_output),
      shape_(shape),
      channels_(Packing<C>::inner(shape.group_out())) {
  const auto& g = shape.geometry;
  const bool in_rows = std::is_same_v<S, C> && channels_ == shape.group_out() &&
      grad_.is_contiguous(at::MemoryFormat::ChannelsLast);
  // An odd last block of positions needs a zero behind it.
  const bool in_planes = std::is_same_v<S, C> &&
      Packing<C>::inner(g.positions()) == g.positions() &&
      g.positions() <= kFarthestPlane && grad_.is_contiguous();
  copies_rows_ = wants_rows && !in_rows;
  copies_planes_ = wants_planes && !in_planes;
}

template <typename S, typename C>
int64_t GradOutput<S, C>::position_bytes() const {
  return int64_t{sizeof(C)} *
      (copies_rows_ * channels_ * shape_.groups +
       copies_planes_ * shape_.out_channels);
}

template <typename S, typename C>
void GradOutput<S, C>::load(
    int64_t first,
    int64_t count,
    int64_t begin,
    int64_t end) {
  first_ = first;
  begin_ = begin;
  end_ = end;
  plane_ = Packing<C>::inner(end - begin);
  const int64_t room = count * plane_ * channels_ * shape_.groups;
  if (room > room_) {
    room_ = room;
    rows_.reset(copies_rows_ ? new C[room] : nullptr);
    planes_.reset(copies_planes_ ? new C[room] : nullptr);
  }
  if (!copies_rows_ && !copies_planes_) {
    return;
  }
  const int64_t pieces = (end - begin + kPositions - 1) / kPositions;
  parallel_tasks(count * pieces, [&](int64_t task, int64_t last) {
    for (; task < last; ++task) {
      const int64_t from = task % pieces * kPositions;
      const int64_t to = std::min(from + kPositions, end - begin);
      copy_positions(task / pieces, from, to);
    }
  });
}

// Both copies from one reading; `image` and positions count from those loaded.
template <typename S, typename C>
void GradOutput<S, C>::copy_positions(int64_t image, int64_t from, int64_t to) {
  const int64_t width = shape_.geometry.out_w;
  const int64_t channels = shape_.group_out();
  const int64_t positions = end_ - begin_;
  for (int64_t group = 0; group < shape_.groups; ++group) {
    const auto map = map_view<S>(grad_, first_ + image, group * channels);
    C* planes = planes_.get() +
        (image * shape_.out_channels + group * channels) * plane_;
    const auto row = [&](int64_t position) {
      return rows_.get() +
          ((image * positions + position) * shape_.groups + group) * channels_;
    };
    const S* pixels[kPositions];
    for (int64_t p = from; p < to; ++p) {
      pixels[p - from] = map.pixel((begin_ + p) / width, (begin_ + p) % width);
    }
    for (int64_t first = 0; first < channels; first += kChannels) {
      const int64_t last = std::min(first + kChannels, channels);
      for (int64_t p = from; p < to; ++p) {
        const S* pixel = pixels[p - from];
        if (copies_rows_) {
          C* to_row = row(p);
          for (int64_t c = first; c < last; ++c) {
            to_row[c] = static_cast<C>(pixel[c * map.channel_stride]);
          }
        }
        if (copies_planes_) {
          for (int64_t c = first; c < last; ++c) {
            planes[c * plane_ + p] =
                static_cast<C>(pixel[c * map.channel_stride]);
          }
        }
      }
    }
    for (int64_t p = from; copies_rows_ && p < to; ++p) {
      std::fill(row(p) + channels, row(p) + channels_, C(0));
    }
    for (int64_t c = 0; copies_planes_ && to == positions && c < channels;
         ++c) {
      std::fill(planes + c * plane_ + to, planes + (c + 1) * plane_, C(0));
    }
  }
}

template <typename S, typename C>
Matrix<const C> GradOutput<S, C>::rows(
    int64_t image,
    int64_t group,
    int64_t from,
    int64_t to) const {
  if constexpr (std::is_same_v<S, C>) {
    if (!copies_rows_) {
      // Not the tensor's strides: those of axes of size 1 may be any number.
      const auto map = map_view<S>(grad_, image, group * channels_);
      const int64_t stride = shape_.out_channels;
      return {map.data + from * stride, to - from, channels_, stride};
    }
  }
  const int64_t stride = shape_.groups * channels_;
  const int64_t row = (image - first_) * (end_ - begin_) + from - begin_;
  return {
      rows_.get() + row * stride + group * channels_,
      to - from,
      channels_,
      stride};
}

template <typename S, typename C>
Matrix<const C> GradOutput<S, C>::planes(
    int64_t image,
    int64_t group,
    int64_t from,
    int64_t to) const {
  const int64_t channels = shape_.group_out();
  const int64_t positions = Packing<C>::inner(to - from);
  if constexpr (std::is_same_v<S, C>) {
    if (!copies_planes_) {
      const auto map = map_view<S>(grad_, image, group * channels);
      const int64_t stride = shape_.geometry.positions();
      return {map.data + from, channels, positions, stride};
    }
  }
  const int64_t channel =
      (image - first_) * shape_.out_channels + group * channels;
  return {
      planes_.get() + channel * plane_ + from - begin_,
      channels,
      positions,
      plane_};
}

template class GradOutput<double, double>;
template class GradOutput<float, float>;
template class GradOutput<c10::Half, float>;
template class GradOutput<c10::BFloat16, float>;
template class GradOutput<c10::BFloat16, c10::BFloat16>;

} // namespace dcn
