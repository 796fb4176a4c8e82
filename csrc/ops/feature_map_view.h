// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include <ATen/core/Tensor.h>

#include "math/macros.h"

namespace dcn {

// View of channels of one feature map, with any strides.
template <typename S>
struct FeatureMapView {
  S* data;
  int64_t channel_stride;
  int64_t row_stride;
  int64_t column_stride;

  DCN_INLINE S* pixel(int64_t y, int64_t x) const {
    return data + y * row_stride + x * column_stride;
  }
};

// View of image `image` of an (N, C, H, W) tensor, from channel `channel` on.
template <typename S>
FeatureMapView<S> feature_map_view(
    const at::Tensor& tensor,
    int64_t image,
    int64_t channel) {
  S* data = static_cast<S*>(tensor.data_ptr()) + image * tensor.stride(0) +
      channel * tensor.stride(1);
  return {data, tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

} // namespace dcn
