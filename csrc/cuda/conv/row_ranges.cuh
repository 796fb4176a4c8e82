// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// How a call is cut into chunks of output positions, forward and backward.
#pragma once

#include <algorithm>

#include <ATen/core/Tensor.h>

namespace dcn::cuda {

// Columns of one chunk: what stays in the L2 cache of a large GPU.
constexpr int64_t kColumnBytes = int64_t{32} << 20;
// Channels-last copies of inputs and of sums of gradients.
constexpr int64_t kCopyBytes = int64_t{96} << 20;

// Positions [position, position + positions) of images
// [image, image + images): either several whole images or part of one.
struct RowRange {
  int64_t image;
  int64_t images;
  int64_t position;
  int64_t positions;

  int64_t rows() const {
    return images * positions;
  }
};

// Calls visit(RowRange) for ranges of at most `most` rows that cover `images`
// images of `positions` positions.
template <typename Visit>
void for_each_range(
    int64_t images,
    int64_t positions,
    int64_t most,
    const Visit& visit) {
  const int64_t whole = std::max<int64_t>(most / positions, 1);
  const int64_t parts = (positions + most - 1) / most;
  const int64_t part = (positions + parts - 1) / parts;
  for (int64_t image = 0; image < images; image += whole) {
    for (int64_t from = 0; from < positions; from += part) {
      visit(
          RowRange{
              image,
              std::min(whole, images - image),
              from,
              std::min(part, positions - from)});
    }
  }
}

// Rows of `depth` columns that fit a chunk.
inline int64_t rows_per_tile(int64_t depth, int64_t element_bytes) {
  return std::max<int64_t>(kColumnBytes / (depth * element_bytes), 1);
}

// `tensor` as (images, channels, positions) of a range: a view, but where its
// strides forbid that a copy, of the lines that the range touches.
inline at::Tensor range_view(const at::Tensor& tensor, const RowRange& range) {
  const int64_t width = tensor.size(3);
  const int64_t line = range.position / width;
  const int64_t end = (range.position + range.positions - 1) / width + 1;
  return tensor.narrow(0, range.image, range.images)
      .narrow(2, line, end - line)
      .flatten(2)
      .narrow(2, range.position - line * width, range.positions);
}

} // namespace dcn::cuda
