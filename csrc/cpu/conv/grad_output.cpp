// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "cpu/conv/grad_output.h"

#include <algorithm>

#include "cpu/conv/rounding.h"
#include "cpu/parallel.h"
#include "ops/feature_map_view.h"

namespace dcn::cpu {
namespace {

// Positions of one task of a copy, and the channels that it copies at a time.
constexpr int64_t kPositions = 64;
constexpr int64_t kChannels = 16;
// From plane to plane, where they are read in place: products take less than
// 2^31 bytes for the rows that they have in hand.
constexpr int64_t kMaxChannelStride = int64_t{1} << 20;

} // namespace

template <typename S, typename C>
GradOutputTile<S, C>::GradOutputTile(
    const at::Tensor& grad_output,
    const DeformConvShape& shape,
    bool wants_position_major,
    bool wants_channel_major)
    : grad_(grad_output),
      shape_(shape),
      channels_(OperandLayout<C>::padded_k(shape.group_out())) {
  const auto& g = shape.geometry;
  const bool reads_position_major = std::is_same_v<S, C> &&
      channels_ == shape.group_out() &&
      grad_.is_contiguous(at::MemoryFormat::ChannelsLast);
  // An odd last block of positions needs a zero behind it.
  const bool reads_channel_major = std::is_same_v<S, C> &&
      OperandLayout<C>::padded_k(g.positions()) == g.positions() &&
      g.positions() <= kMaxChannelStride && grad_.is_contiguous();
  copies_position_major_ = wants_position_major && !reads_position_major;
  copies_channel_major_ = wants_channel_major && !reads_channel_major;
}

template <typename S, typename C>
int64_t GradOutputTile<S, C>::position_bytes() const {
  return int64_t{sizeof(C)} *
      (copies_position_major_ * channels_ * shape_.groups +
       copies_channel_major_ * shape_.out_channels);
}

template <typename S, typename C>
void GradOutputTile<S, C>::load(
    int64_t first,
    int64_t count,
    int64_t begin,
    int64_t end) {
  first_ = first;
  begin_ = begin;
  end_ = end;
  channel_stride_ = OperandLayout<C>::padded_k(end - begin);
  const int64_t room = count * channel_stride_ * channels_ * shape_.groups;
  if (room > room_) {
    room_ = room;
    position_major_.reset(copies_position_major_ ? new C[room] : nullptr);
    channel_major_.reset(copies_channel_major_ ? new C[room] : nullptr);
  }
  if (!copies_position_major_ && !copies_channel_major_) {
    return;
  }
  const int64_t segments = (end - begin + kPositions - 1) / kPositions;
  parallel_tasks(count * segments, [&](int64_t task, int64_t last) {
    for (; task < last; ++task) {
      const int64_t from = task % segments * kPositions;
      const int64_t to = std::min(from + kPositions, end - begin);
      copy_positions(task / segments, from, to);
    }
  });
}

// Both copies from one reading; `image` and positions count from those loaded.
template <typename S, typename C>
void GradOutputTile<S, C>::copy_positions(
    int64_t image,
    int64_t from,
    int64_t to) {
  const int64_t width = shape_.geometry.out_w;
  const int64_t channels = shape_.group_out();
  const int64_t positions = end_ - begin_;
  for (int64_t group = 0; group < shape_.groups; ++group) {
    const auto map =
        feature_map_view<S>(grad_, first_ + image, group * channels);
    C* planes = channel_major_.get() +
        (image * shape_.out_channels + group * channels) * channel_stride_;
    const auto row = [&](int64_t position) {
      return position_major_.get() +
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
        if (copies_position_major_) {
          C* to_row = row(p);
          for (int64_t c = first; c < last; ++c) {
            to_row[c] = static_cast<C>(pixel[c * map.channel_stride]);
          }
        }
        if (copies_channel_major_) {
          for (int64_t c = first; c < last; ++c) {
            planes[c * channel_stride_ + p] =
                static_cast<C>(pixel[c * map.channel_stride]);
          }
        }
      }
    }
    for (int64_t p = from; copies_position_major_ && p < to; ++p) {
      std::fill(row(p) + channels, row(p) + channels_, C(0));
    }
    for (int64_t c = 0;
         copies_channel_major_ && to == positions && c < channels;
         ++c) {
      std::fill(
          planes + c * channel_stride_ + to,
          planes + (c + 1) * channel_stride_,
          C(0));
    }
  }
}

template <typename S, typename C>
Matrix<const C> GradOutputTile<S, C>::rows(
    int64_t image,
    int64_t group,
    int64_t from,
    int64_t to) const {
  if constexpr (std::is_same_v<S, C>) {
    if (!copies_position_major_) {
      // Not the tensor's strides: those of axes of size 1 may be any number.
      const auto map = feature_map_view<S>(grad_, image, group * channels_);
      const int64_t stride = shape_.out_channels;
      return {map.data + from * stride, to - from, channels_, stride};
    }
  }
  const int64_t stride = shape_.groups * channels_;
  const int64_t row = (image - first_) * (end_ - begin_) + from - begin_;
  return {
      position_major_.get() + row * stride + group * channels_,
      to - from,
      channels_,
      stride};
}

template <typename S, typename C>
Matrix<const C> GradOutputTile<S, C>::planes(
    int64_t image,
    int64_t group,
    int64_t from,
    int64_t to) const {
  const int64_t channels = shape_.group_out();
  const int64_t positions = OperandLayout<C>::padded_k(to - from);
  if constexpr (std::is_same_v<S, C>) {
    if (!copies_channel_major_) {
      const auto map = feature_map_view<S>(grad_, image, group * channels);
      const int64_t stride = shape_.geometry.positions();
      return {map.data + from, channels, positions, stride};
    }
  }
  const int64_t channel =
      (image - first_) * shape_.out_channels + group * channels;
  return {
      channel_major_.get() + channel * channel_stride_ + from - begin_,
      channels,
      positions,
      channel_stride_};
}

template class GradOutputTile<double, double>;
template class GradOutputTile<float, float>;
template class GradOutputTile<c10::Half, float>;
template class GradOutputTile<c10::BFloat16, float>;
template class GradOutputTile<c10::BFloat16, c10::BFloat16>;

} // namespace dcn::cpu
