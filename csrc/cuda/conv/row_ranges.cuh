// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Splits the output positions of a batch into ranges whose columns fit the
// workspace. Both passes work on one range at a time.
#pragma once

#include <algorithm>

#include <ATen/core/Tensor.h>

#include "cuda/workspace.cuh"

namespace dcn::cuda {

// Positions [position, position + positions) of images
// [image, image + images): several whole images, or part of one.
struct RowRange {
  int64_t image;
  int64_t images;
  int64_t position;
  int64_t positions;

  int64_t rows() const {
    return images * positions;
  }
};

// Calls visit(RowRange) for ranges of at most `max_rows` rows that cover
// `images` images of `positions` positions.
template <typename Visit>
void for_each_range(
    int64_t images,
    int64_t positions,
    int64_t max_rows,
    const Visit& visit) {
  const int64_t whole_images = std::max<int64_t>(max_rows / positions, 1);
  const int64_t parts = (positions + max_rows - 1) / max_rows;
  const int64_t part = (positions + parts - 1) / parts;
  for (int64_t image = 0; image < images; image += whole_images) {
    for (int64_t from = 0; from < positions; from += part) {
      visit(
          RowRange{
              image,
              std::min(whole_images, images - image),
              from,
              std::min(part, positions - from)});
    }
  }
}

// How many rows of `depth` columns fit an im2col tile.
inline int64_t rows_per_tile(int64_t depth, int64_t element_bytes) {
  return std::max<int64_t>(kColumnBytes / (depth * element_bytes), 1);
}

// The range of `tensor` as (images, channels, positions): a view, or a copy
// where the strides of the tensor do not allow a view.
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
