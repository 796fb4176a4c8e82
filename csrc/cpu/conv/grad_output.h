// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include <memory>

#include "cpu/conv/gemm.h"
#include "ops/deform_conv2d.h"

namespace dcn::cpu {

// grad_output as the two products of the backward pass read it: rows of
// channels for the gradient of the columns, planes of positions for that of the
// weight. Whichever its layout and dtype do not give is copied, for one tile of
// positions of a few images at a time. C is the dtype of the columns.
template <typename S, typename C>
class GradOutputTile {
 public:
  GradOutputTile(
      const at::Tensor& grad_output,
      const DeformConvShape& shape,
      bool wants_position_major,
      bool wants_channel_major);

  // Of all copies, for one position of one image.
  int64_t position_bytes() const;

  // Makes room for positions [begin, end) of images [first, first + count),
  // and copies what has to be copied.
  void load(int64_t first, int64_t count, int64_t begin, int64_t end);

  // Positions [from, to) of what was loaded; positions * channels.
  Matrix<const C> rows(int64_t image, int64_t group, int64_t from, int64_t to)
      const;
  // The same; channels * positions.
  Matrix<const C> planes(int64_t image, int64_t group, int64_t from, int64_t to)
      const;

 private:
  void copy_positions(int64_t image, int64_t from, int64_t to);

  const at::Tensor& grad_;
  const DeformConvShape& shape_;
  bool copies_position_major_;
  bool copies_channel_major_;
  int64_t channels_; // of a group in `rows_`: even where terms go in pairs
  int64_t first_ = 0; // image
  int64_t begin_ = 0; // position
  int64_t end_ = 0;
  int64_t channel_stride_ = 0; // room for the positions of one plane
  int64_t room_ = 0; // elements that each buffer can hold
  std::unique_ptr<C[]>
      position_major_; // (images, positions, groups, channels_)
  std::unique_ptr<C[]> channel_major_; // (images, out_channels, plane_)
};

} // namespace dcn::cpu
