// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// grad_output as the two GEMMs of the backward pass read it: positions by
// channels for the gradient of the columns, channels by positions for that of
// the weight. It is copied for one tile of positions of a few images at a time,
// in blocks of positions, so that no stride follows from the size of the map.
// Positions by channels are read in place where the memory format and dtype
// allow.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/buffer.h"
#include "cpu/conv/gemm.h"
#include "cpu/parallel.h"
#include "cpu/transpose.h"
#include "ops/any_dtype_view.h"
#include "ops/deform_conv2d.h"
#include "ops/feature_map_view.h"

namespace dcn::cpu {

// Size of the copies of grad_output.
struct GradOutputBytes {
  int64_t position;
  // Per position of the last block of a tile, in addition.
  int64_t partial_block;
};

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
        wants_position_major_(wants_position_major),
        wants_channel_major_(wants_channel_major),
        reads_in_place_(
            std::is_same_v<S, C> &&
            OperandLayout<C>::padded_k(shape.group_out()) ==
                shape.group_out() &&
            grad_.is_contiguous(at::MemoryFormat::ChannelsLast)),
        channels_(OperandLayout<C>::padded_k(shape.group_out())) {}

  GradOutputBytes bytes() const {
    const int64_t position_major =
        int64_t{sizeof(C)} * wants_position_major_ * channels_ * shape_.groups;
    const int64_t channel_major =
        int64_t{sizeof(C)} * wants_channel_major_ * shape_.out_channels;
    if (reads_in_place_) {
      return {channel_major, position_major};
    }
    return {position_major + channel_major, 0};
  }

  // Loads positions [begin, end) of images [first, first + count), in blocks of
  // `block` positions.
  void load(
      int64_t first,
      int64_t count,
      int64_t begin,
      int64_t end,
      int64_t block) {
    first_ = first;
    begin_ = begin;
    end_ = end;
    block_ = block;
    const int64_t positions = end - begin;
    const int64_t partial = positions % block;
    padded_ = positions - partial + padded_block(partial);
    // A block that is padded must be copied.
    in_place_ = 0;
    if (reads_in_place_) {
      in_place_ = padded_ == positions ? positions : positions - partial;
    }
    if (wants_position_major_) {
      position_major_.resize(
          count * (padded_ - in_place_) * channels_ * shape_.groups);
    }
    if (wants_channel_major_) {
      image_size_ = positions / block * block_size(block) +
          block_size(padded_block(partial));
      channel_major_.resize(count * image_size_);
    }
    const int64_t from_block = wants_channel_major_ ? 0 : in_place_ / block;
    const int64_t blocks = (positions + block - 1) / block - from_block;
    const int64_t chunks = (block + kPositions - 1) / kPositions;
    parallel_tasks(count * blocks * chunks, [&](int64_t task, int64_t last) {
      for (; task < last; ++task) {
        copy_positions(
            task / chunks / blocks,
            (from_block + task / chunks % blocks) * block,
            task % chunks * kPositions);
      }
    });
  }

  // Size of a block of this many positions, with padding.
  int64_t padded_block(int64_t positions) const {
    return std::min(padded_size(positions), block_);
  }

  // Loaded positions [from, to) of a group, (positions, channels): one block,
  // padded.
  Matrix<const C> position_major(
      int64_t image,
      int64_t group,
      int64_t from,
      int64_t to) const {
    const int64_t rows = padded_block(to - from);
    if constexpr (std::is_same_v<S, C>) {
      if (from - begin_ < in_place_) {
        // Not the tensor's strides: that of an axis of size 1 may be any
        // number.
        const auto map = feature_map_view<S>(grad_, image, group * channels_);
        const int64_t stride = shape_.out_channels;
        return {map.data + from * stride, rows, channels_, stride};
      }
    }
    return {
        copied_row(image - first_, group, from - begin_),
        rows,
        channels_,
        shape_.groups * channels_};
  }

  // The same, (channels, positions).
  Matrix<const C> channel_major(
      int64_t image,
      int64_t group,
      int64_t from,
      int64_t to) const {
    const int64_t positions = padded_block(to - from);
    const int64_t stride = channel_stride(positions);
    return {
        copied_block(image - first_, group, from - begin_, stride),
        shape_.group_out(),
        positions,
        stride};
  }

 private:
  // Positions of one task of a copy.
  static constexpr int64_t kPositions = 64;

  // Elements are written before they are read.
  class GrowingBuffer {
   public:
    void resize(int64_t size) {
      if (size > size_) {
        size_ = size;
        data_ = make_buffer<C>(size);
      }
    }
    C* data() const {
      return data_.get();
    }

   private:
    int64_t size_ = 0;
    Buffer<C> data_;
  };

  // In the following, `image` and positions count from those loaded.

  C* copied_row(int64_t image, int64_t group, int64_t position) const {
    const int64_t row = image * (padded_ - in_place_) + position - in_place_;
    return position_major_.data() + (row * shape_.groups + group) * channels_;
  }

  // From channel to channel of a block, padded.
  static int64_t channel_stride(int64_t positions) {
    // Not a power of two, which would map all rows to the same few cache sets.
    return positions % 256 == 0 ? positions + 16 : positions;
  }
  int64_t block_size(int64_t positions) const {
    return shape_.out_channels * channel_stride(positions);
  }

  // The block that starts at `position`, of `stride` elements per channel.
  C* copied_block(
      int64_t image,
      int64_t group,
      int64_t position,
      int64_t stride) const {
    return channel_major_.data() + image * image_size_ +
        position / block_ * block_size(block_) +
        group * shape_.group_out() * stride;
  }

  // Copies up to kPositions positions of the block that starts at `block`, from
  // its position `offset` on.
  void copy_positions(int64_t image, int64_t block, int64_t offset) {
    const int64_t positions = std::min(block_, end_ - begin_ - block);
    const int64_t size = padded_block(positions);
    const int64_t stride = channel_stride(size);
    const int64_t count = std::min(kPositions, positions - offset);
    if (count <= 0) {
      return;
    }
    // After the last position: padding.
    const int64_t padded = offset + count == positions ? size - offset : count;
    const bool by_position = wants_position_major_ && block >= in_place_;
    for (int64_t group = 0; group < shape_.groups; ++group) {
      const Positions from(
          feature_map_view<const S>(
              grad_, first_ + image, group * shape_.group_out()),
          shape_.geometry,
          begin_ + block + offset);
      if (by_position) {
        copy_rows(
            from, count, padded, copied_row(image, group, block + offset));
      }
      if (wants_channel_major_) {
        copy_columns(
            from,
            count,
            padded,
            stride,
            copied_block(image, group, block, stride) + offset);
      }
    }
  }

  // The positions of a map from `first` on.
  struct Positions {
    FeatureMapView<const S> map;
    int64_t width;
    int64_t first;
    // From position to position, or 0 if they have no common stride. That of
    // an axis of size 1 may be any number.
    int64_t stride;

    Positions(
        const FeatureMapView<const S>& map,
        const ConvGeometry& geometry,
        int64_t first)
        : map(map), width(geometry.out_w), first(first) {
      const bool is_regular = geometry.out_h == 1 || geometry.out_w == 1 ||
          map.row_stride == width * map.column_stride;
      stride = width > 1 ? map.column_stride : map.row_stride;
      stride = is_regular ? stride : 0;
    }

    const S* at(int64_t i) const {
      return map.pixel((first + i) / width, (first + i) % width);
    }
  };

  // To (padded, groups, channels_).
  void copy_rows(const Positions& from, int64_t count, int64_t padded, C* to)
      const {
    const int64_t channels = shape_.group_out();
    const int64_t stride = shape_.groups * channels_;
    const OpMathType<S>* const no_bias = nullptr;
    if (from.stride == 1) {
      transpose<S, C, false>(
          from.at(0),
          from.map.channel_stride,
          channels,
          count,
          no_bias,
          to,
          stride);
    } else {
      for (int64_t i = 0; i < count; ++i) {
        const S* pixel = from.at(i);
        for (int64_t c = 0; c < channels; ++c) {
          to[i * stride + c] =
              static_cast<C>(pixel[c * from.map.channel_stride]);
        }
      }
    }
    for (int64_t i = 0; i < padded; ++i) {
      C* row = to + i * stride;
      std::fill(row + (i < count ? channels : 0), row + channels_, C(0));
    }
  }

  // To (channels, stride).
  void copy_columns(
      const Positions& from,
      int64_t count,
      int64_t padded,
      int64_t stride,
      C* to) const {
    const int64_t channels = shape_.group_out();
    const int64_t channel_stride = from.map.channel_stride;
    const OpMathType<S>* const no_bias = nullptr;
    if (from.stride > 1 && channel_stride == 1) {
      transpose<S, C, false>(
          from.at(0), from.stride, count, channels, no_bias, to, stride);
    } else if (from.stride == 1) {
      for (int64_t c = 0; c < channels; ++c) {
        const S* row = from.at(0) + c * channel_stride;
        for (int64_t i = 0; i < count; ++i) {
          to[c * stride + i] = static_cast<C>(row[i]);
        }
      }
    } else {
      for (int64_t i = 0; i < count; ++i) {
        const S* pixel = from.at(i);
        for (int64_t c = 0; c < channels; ++c) {
          to[c * stride + i] = static_cast<C>(pixel[c * channel_stride]);
        }
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      std::fill(to + c * stride + count, to + c * stride + padded, C(0));
    }
  }

  const at::Tensor& grad_;
  const DeformConvShape& shape_;
  bool wants_position_major_;
  bool wants_channel_major_;
  bool reads_in_place_; // positions by channels
  int64_t channels_; // of a group, padded
  int64_t first_ = 0; // image
  int64_t begin_ = 0; // position
  int64_t end_ = 0;
  int64_t block_ = 0; // positions of a block
  int64_t padded_ = 0; // positions, with padding
  int64_t in_place_ = 0; // positions that are read in place
  // (images, padded_ - in_place_, groups, channels_)
  GrowingBuffer position_major_;
  int64_t image_size_ = 0; // elements of channel_major_
  // (images, blocks, out_channels, channel_stride())
  GrowingBuffer channel_major_;
};

} // namespace dcn::cpu
