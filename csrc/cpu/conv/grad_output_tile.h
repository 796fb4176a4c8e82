// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// grad_output as the two GEMMs of the backward pass read it: positions by
// channels for the gradient of the columns, channels by positions for that of
// the weight. It is read in place where its memory format and dtype allow;
// otherwise copied, for one tile of positions of a few images at a time.
#pragma once

#include <algorithm>
#include <memory>
#include <type_traits>

#include "cpu/conv/gemm.h"
#include "cpu/parallel.h"
#include "ops/deform_conv2d.h"
#include "ops/feature_map_view.h"

namespace dcn::cpu {

// S is the dtype of grad_output, C that of the GEMM operands.
template <typename S, typename C>
class GradOutputTile {
 public:
  GradOutputTile(
      const at::Tensor& grad_output,
      const DeformConvShape& shape,
      bool wants_position_major,
      bool wants_channel_major)
      : grad_(grad_output),
        shape_(shape),
        channels_(OperandLayout<C>::padded_k(shape.group_out())) {
    const int64_t positions = shape.geometry.positions();
    const bool reads_position_major = std::is_same_v<S, C> &&
        channels_ == shape.group_out() &&
        grad_.is_contiguous(at::MemoryFormat::ChannelsLast);
    // The padding of an odd number of positions needs a copy.
    const bool reads_channel_major = std::is_same_v<S, C> &&
        OperandLayout<C>::padded_k(positions) == positions &&
        positions <= kMaxChannelStride && grad_.is_contiguous();
    copies_position_major_ = wants_position_major && !reads_position_major;
    copies_channel_major_ = wants_channel_major && !reads_channel_major;
  }

  // Size of the copies, per position of an image.
  int64_t position_bytes() const {
    return int64_t{sizeof(C)} *
        (copies_position_major_ * channels_ * shape_.groups +
         copies_channel_major_ * shape_.out_channels);
  }

  // Loads positions [begin, end) of images [first, first + count): copies what
  // cannot be read in place.
  void load(int64_t first, int64_t count, int64_t begin, int64_t end) {
    first_ = first;
    begin_ = begin;
    end_ = end;
    channel_stride_ = OperandLayout<C>::padded_k(end - begin);
    const int64_t size = count * channel_stride_ * channels_ * shape_.groups;
    if (size > size_) {
      size_ = size;
      position_major_.reset(copies_position_major_ ? new C[size] : nullptr);
      channel_major_.reset(copies_channel_major_ ? new C[size] : nullptr);
    }
    if (!copies_position_major_ && !copies_channel_major_) {
      return;
    }
    const int64_t blocks = (end - begin + kPositions - 1) / kPositions;
    parallel_tasks(count * blocks, [&](int64_t task, int64_t last) {
      for (; task < last; ++task) {
        const int64_t from = task % blocks * kPositions;
        const int64_t to = std::min(from + kPositions, end - begin);
        copy_positions(task / blocks, from, to);
      }
    });
  }

  // Loaded positions [from, to) of a group, (positions, channels).
  Matrix<const C> position_major(
      int64_t image,
      int64_t group,
      int64_t from,
      int64_t to) const {
    if constexpr (std::is_same_v<S, C>) {
      if (!copies_position_major_) {
        // Not the tensor's strides: that of an axis of size 1 may be any
        // number.
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

  // The same, (channels, positions).
  Matrix<const C> channel_major(
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

 private:
  // Positions of one task of a copy, and the channels that it copies at a time.
  static constexpr int64_t kPositions = 64;
  static constexpr int64_t kChannels = 16;
  // oneDNN's GEMM takes less than 2^31 bytes for the rows of a register block.
  static constexpr int64_t kMaxChannelStride = int64_t{1} << 20;

  // Makes both copies in one pass; `image` and positions count from those
  // loaded.
  void copy_positions(int64_t image, int64_t from, int64_t to) {
    const int64_t width = shape_.geometry.out_w;
    const int64_t channels = shape_.group_out();
    const int64_t positions = end_ - begin_;
    for (int64_t group = 0; group < shape_.groups; ++group) {
      const auto map =
          feature_map_view<S>(grad_, first_ + image, group * channels);
      C* by_channel = channel_major_.get() +
          (image * shape_.out_channels + group * channels) * channel_stride_;
      const auto by_position = [&](int64_t position) {
        return position_major_.get() +
            ((image * positions + position) * shape_.groups + group) *
            channels_;
      };
      const S* pixels[kPositions];
      for (int64_t p = from; p < to; ++p) {
        pixels[p - from] =
            map.pixel((begin_ + p) / width, (begin_ + p) % width);
      }
      for (int64_t first = 0; first < channels; first += kChannels) {
        const int64_t last = std::min(first + kChannels, channels);
        for (int64_t p = from; p < to; ++p) {
          const S* pixel = pixels[p - from];
          if (copies_position_major_) {
            C* row = by_position(p);
            for (int64_t c = first; c < last; ++c) {
              row[c] = static_cast<C>(pixel[c * map.channel_stride]);
            }
          }
          if (copies_channel_major_) {
            for (int64_t c = first; c < last; ++c) {
              by_channel[c * channel_stride_ + p] =
                  static_cast<C>(pixel[c * map.channel_stride]);
            }
          }
        }
      }
      // Padding of the K dimension.
      for (int64_t p = from; copies_position_major_ && p < to; ++p) {
        std::fill(by_position(p) + channels, by_position(p) + channels_, C(0));
      }
      for (int64_t c = 0;
           copies_channel_major_ && to == positions && c < channels;
           ++c) {
        C* row = by_channel + c * channel_stride_;
        std::fill(row + to, row + channel_stride_, C(0));
      }
    }
  }

  const at::Tensor& grad_;
  const DeformConvShape& shape_;
  bool copies_position_major_;
  bool copies_channel_major_;
  int64_t channels_; // of a group, padded
  int64_t first_ = 0; // image
  int64_t begin_ = 0; // position
  int64_t end_ = 0;
  int64_t channel_stride_ = 0; // of the channel-major copy
  int64_t size_ = 0; // elements allocated for each copy
  // (images, positions, groups, channels_)
  std::unique_ptr<C[]> position_major_;
  // (images, out_channels, channel_stride_)
  std::unique_ptr<C[]> channel_major_;
};

} // namespace dcn::cpu
