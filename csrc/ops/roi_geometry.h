// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Boxes and offsets of RoI pooling, and the location of every bin.

#pragma once

#include "ops/any_dtype_view.h"
#include "ops/roi_pool.h"

namespace dcn {

enum class RoiState : int {
  kInside, // has samples
  kEmpty, // a box coordinate is infinite: the output is 0
  kNan, // box or offset is NaN: so are output and offset gradient
  kNoImage // invalid batch index (CUDA only): output NaN, gradients 0
};

// One bin of one class of a RoI. Its samples form the grid y * x.
template <typename T>
struct RoiBin {
  RoiState state;
  int64_t image;
  BinAxis<T> y;
  BinAxis<T> x;
  T offset_scale_y; // d position / d offset
  T offset_scale_x;
};

// A box on the feature map, shared by all bins of the RoI.
template <typename T>
struct RoiBox {
  RoiState state;
  int64_t image;
  RoiAxis<T> y;
  RoiAxis<T> x;
};

// A bin, and the part (cell of the offset tensor) that shifts it.
struct BinIndex {
  int i;
  int j;
  int part_y;
  int part_x;
};

// The boxes and offsets of a call.
struct RoiGeometry {
  RoiPoolShape shape;
  AnyDtypeView boxes;
  AnyDtypeView offset; // undefined: every offset is 0

  template <typename T>
  DCN_INLINE T box(int64_t roi, int column) const {
    return boxes.load<T>(boxes.at(roi, column, 0, 0));
  }

  DCN_INLINE int part_y(int i) const {
    return static_cast<int>(int64_t{i} * shape.parts.h / shape.bins.h);
  }
  DCN_INLINE int part_x(int j) const {
    return static_cast<int>(int64_t{j} * shape.parts.w / shape.bins.w);
  }

  DCN_INLINE BinIndex bin(int i, int j) const {
    return {i, j, part_y(i), part_x(j)};
  }

  // The image of a RoI; -1 if the batch index is invalid.
  DCN_INLINE int64_t image_of(int64_t roi) const {
    const double index = box<double>(roi, 0);
    const bool exists = index >= 0 && index < static_cast<double>(shape.batch);
    const int64_t image = exists ? static_cast<int64_t>(index) : -1;
    return static_cast<double>(image) == index ? image : -1;
  }

  // The element of the offset tensor for a bin, along x (axis 0) or y (axis 1).
  template <typename T>
  DCN_INLINE T offset_of(
      int64_t roi,
      int64_t class_index,
      int axis,
      const BinIndex& bin) const {
    return offset.defined()
        ? offset.load<T>(
              offset.at(roi, 2 * class_index + axis, bin.part_y, bin.part_x))
        : T(0);
  }

  template <typename T>
  DCN_INLINE RoiBox<T> roi_box(int64_t roi) const {
    const T x1 = box<T>(roi, 1), y1 = box<T>(roi, 2);
    const T x2 = box<T>(roi, 3), y2 = box<T>(roi, 4);
    const T scale = static_cast<T>(shape.spatial_scale);
    RoiBox<T> roi_box{};
    roi_box.image = image_of(roi);
    const T sum = (x1 - x1) + (y1 - y1) + (x2 - x2) + (y2 - y2);
    if (roi_box.image < 0) {
      roi_box.state = RoiState::kNoImage;
    } else if (x1 != x1 || y1 != y1 || x2 != x2 || y2 != y2) {
      roi_box.state = RoiState::kNan;
    } else if (sum != sum) { // infinity - infinity
      roi_box.state = RoiState::kEmpty;
    } else {
      const int64_t ratio = shape.sampling_ratio;
      roi_box.y = make_roi_axis(shape.mode, y1, y2, scale, shape.bins.h, ratio);
      roi_box.x = make_roi_axis(shape.mode, x1, x2, scale, shape.bins.w, ratio);
    }
    return roi_box;
  }

  template <typename T>
  DCN_INLINE RoiBin<T> locate(
      const RoiBox<T>& roi_box,
      int64_t roi,
      int64_t class_index,
      const BinIndex& index) const {
    const T gamma = static_cast<T>(shape.gamma);
    const T dx = offset_of<T>(roi, class_index, 0, index);
    const T dy = offset_of<T>(roi, class_index, 1, index);
    RoiBin<T> bin{};
    bin.image = roi_box.image;
    bin.state = roi_box.state;
    if (bin.state != RoiState::kNoImage && (dx != dx || dy != dy)) {
      bin.state = RoiState::kNan;
    }
    if (bin.state == RoiState::kInside) {
      bin.offset_scale_y = gamma * roi_box.y.size;
      bin.offset_scale_x = gamma * roi_box.x.size;
      bin.y = make_bin_axis(
          shape.mode,
          shape.map.h,
          roi_box.y,
          index.i,
          shape.bins.h,
          dy * bin.offset_scale_y);
      bin.x = make_bin_axis(
          shape.mode,
          shape.map.w,
          roi_box.x,
          index.j,
          shape.bins.w,
          dx * bin.offset_scale_x);
    }
    return bin;
  }

  template <typename T>
  DCN_INLINE RoiBin<T> locate(int64_t roi, int64_t class_index, int i, int j)
      const {
    return locate(roi_box<T>(roi), roi, class_index, bin(i, j));
  }
};

inline RoiGeometry roi_geometry(
    const RoiPoolShape& shape,
    const at::Tensor& boxes,
    const OptionalTensor& offset) {
  return {
      shape,
      AnyDtypeView(boxes.unsqueeze(2).unsqueeze(3)),
      offset ? AnyDtypeView(*offset) : AnyDtypeView()};
}

} // namespace dcn
