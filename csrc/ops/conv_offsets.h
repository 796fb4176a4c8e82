// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include "math/deform_tap.h"
#include "ops/any_dtype_view.h"
#include "ops/deform_conv2d.h"

namespace dcn {

// Offset and mask of a call. locate() returns the sampling location of a tap.
struct ConvOffsets {
  ConvGeometry geometry;
  int64_t offset_groups;
  AnyDtypeView offset;
  AnyDtypeView mask; // undefined: every mask is 1

  template <typename T>
  DCN_INLINE DeformTap<T> locate(
      int64_t image,
      int64_t offset_group,
      int y,
      int x,
      int kernel_y,
      int kernel_x) const {
    const int tap = kernel_y * geometry.kernel_w + kernel_x;
    const int64_t channel = offset_group * geometry.taps() + tap;
    const T dy = offset.load<T>(offset.at(image, 2 * channel, y, x));
    const T dx = offset.load<T>(offset.at(image, 2 * channel + 1, y, x));
    const T mask_value =
        mask.defined() ? mask.load<T>(mask.at(image, channel, y, x)) : T(1);
    const auto& g = geometry;
    const int64_t base_y =
        grid_position(y, g.stride_h, g.pad_h, kernel_y, g.dilation_h);
    const int64_t base_x =
        grid_position(x, g.stride_w, g.pad_w, kernel_x, g.dilation_w);
    return locate_tap(
        static_cast<T>(base_y) + dy,
        static_cast<T>(base_x) + dx,
        mask_value,
        g.in_h,
        g.in_w);
  }
};

// Gradients of offset and mask; either may be undefined.
struct ConvOffsetGradients {
  AnyDtypeView offset;
  AnyDtypeView mask;

  DCN_INLINE bool any_defined() const {
    return offset.defined() || mask.defined();
  }

  // `gradient` is that of (dy, dx, mask). Adds to the stored one if `adds`.
  template <typename T>
  DCN_INLINE void store(
      const ConvGeometry& geometry,
      int64_t image,
      int64_t offset_group,
      int64_t y,
      int64_t x,
      int tap,
      const T* gradient,
      bool adds) const {
    const int64_t channel = offset_group * geometry.taps() + tap;
    if (offset.defined()) {
      offset.store_or_add(
          offset.at(image, 2 * channel, y, x), gradient[0], adds);
      offset.store_or_add(
          offset.at(image, 2 * channel + 1, y, x), gradient[1], adds);
    }
    if (mask.defined()) {
      mask.store_or_add(mask.at(image, channel, y, x), gradient[2], adds);
    }
  }
};

inline ConvOffsets conv_offsets(
    const DeformConvShape& shape,
    const at::Tensor& offset,
    const OptionalTensor& mask) {
  return {
      shape.geometry,
      shape.offset_groups,
      AnyDtypeView(offset),
      mask ? AnyDtypeView(*mask) : AnyDtypeView()};
}

inline ConvOffsetGradients conv_offset_gradients(
    const DeformConvGradients& gradients) {
  const auto view = [](const at::Tensor& tensor) {
    return tensor.numel() > 0 ? AnyDtypeView(tensor) : AnyDtypeView();
  };
  return {view(gradients.offset), view(gradients.mask)};
}

} // namespace dcn
