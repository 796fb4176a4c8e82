// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include <limits>
#include <vector>

#include "cpu/roi/offset_grad_buffer.h"
#include "cpu/roi/roi_pool.h"
#include "cpu/roi/roi_pool_batched.h"
#include "cpu/roi/roi_pool_per_channel.h"

namespace dcn {

// What one task of the backward pass adds to: some output channels, all of one
// class, of one group of bins.
template <typename M, typename T>
struct RoiPart {
  const RoiFrames<T>& frames;
  int64_t first_roi; // of the chunk whose slopes are kept
  const std::vector<BinIndex>& bins;
  int64_t slice;
  int64_t of_class;
  int64_t channel; // of the output; the first of the views
  int64_t channels;
  MapView<const M> map;
  MapView<T> grad_input; // data null: not wanted
};

template <typename T>
struct RoiBackwardScratch {
  AxisWeights<T> y, x;
  LaneBins<T> lanes;
  std::vector<T> gradient;

  RoiBackwardScratch(const RoiPoolShape& shape, int64_t widest)
      : y(shape.map.h), x(shape.map.w), gradient(widest) {}
};

template <typename M>
MapView<M> channels_from(MapView<M> view, int64_t channel) {
  if (view.data != nullptr) {
    view.data += channel * view.channel_stride;
  }
  return view;
}

// Adds the gradients of bins to their pixels, and keeps the slopes.
template <typename S, typename T>
class RoiBackwardBins {
 public:
  // `slopes` may be null: not wanted.
  RoiBackwardBins(
      const RoiSource& source,
      const at::Tensor& grad_output,
      const BinSlopes<T>* slopes)
      : source_(source),
        shape_(source.shape),
        pooled_(map_view<const S>(grad_output, 0, 0)),
        pooled_stride_(grad_output.stride(0)),
        slopes_(slopes) {}

  template <typename M>
  void run(
      const RoiPart<M, T>& part,
      const std::vector<int64_t>& rois,
      RoiBackwardScratch<T>& scratch) const {
    if (is_narrow(shape_) &&
        is_finite(part.map, part.channels, shape_.map.h, shape_.map.w)) {
      run_lanes(part, rois, scratch);
      return;
    }
    for (const int64_t roi : rois) {
      for (const BinIndex& bin : part.bins) {
        run_bin(part, roi, bin, scratch);
      }
    }
  }

 private:
  // The same bin of several RoIs at a time.
  template <typename M>
  void run_lanes(
      const RoiPart<M, T>& part,
      const std::vector<int64_t>& rois,
      RoiBackwardScratch<T>& scratch) const {
    auto& lanes = scratch.lanes;
    for (const BinIndex& bin : part.bins) {
      for (const int64_t roi : rois) {
        const auto located =
            source_.locate(part.frames[roi], roi, part.of_class, bin);
        if (!has_finite_gradient(part, roi, bin) || !lanes.take(roi, located)) {
          run_bin(part, roi, bin, scratch);
        } else if (lanes.full()) {
          finish_lanes(part, bin, lanes);
        }
      }
      finish_lanes(part, bin, lanes);
    }
  }

  template <typename M>
  void finish_lanes(
      const RoiPart<M, T>& part,
      const BinIndex& bin,
      LaneBins<T>& lanes) const {
    lanes.find(shape_);
    for (int lane = 0; lane < lanes.size; ++lane) {
      BinSlope<T> slope{T(0), T(0)};
      const T divisor = lanes.divisor(shape_.mode, lane);
      const S* gradient = gradient_of(part, lanes.roi[lane], bin);
      for (int64_t c = 0; divisor > T(0) && c < part.channels; ++c) {
        const auto found = backward_lane<M>(
            channels_from(part.map, c),
            lanes,
            lane,
            static_cast<T>(gradient[c * pooled_.channel_stride]) / divisor,
            slopes_ != nullptr,
            channels_from(part.grad_input, c));
        slope.y += found.y;
        slope.x += found.x;
      }
      slope.y *= lanes.offset_scale_y[lane];
      slope.x *= lanes.offset_scale_x[lane];
      keep_slope(part, lanes.roi[lane], bin, slope);
    }
    lanes.size = 0;
  }

  template <typename M>
  void run_bin(
      const RoiPart<M, T>& part,
      int64_t roi,
      const BinIndex& index,
      RoiBackwardScratch<T>& scratch) const {
    const auto bin =
        source_.locate(part.frames[roi], roi, part.of_class, index);
    BinSlope<T> slope{T(0), T(0)};
    T divisor = 0;
    if (bin.state == RoiState::kInside) {
      scratch.y.sum(bin.y);
      scratch.x.sum(bin.x);
      divisor = bin_divisor(bin.y, bin.x, scratch.y.kept, scratch.x.kept);
    } else if (bin.state == RoiState::kNan) {
      slope.y = slope.x = std::numeric_limits<T>::quiet_NaN();
    }
    if (divisor > T(0)) {
      const S* gradient = gradient_of(part, roi, index);
      for (int64_t c = 0; c < part.channels; ++c) {
        scratch.gradient[c] =
            static_cast<T>(gradient[c * pooled_.channel_stride]) / divisor;
      }
      const auto backward = part.channels < kNarrowClass
          ? backward_planes<M, T>
          : backward_pixels<M, T>;
      slope = backward(
          part.map,
          scratch.y,
          scratch.x,
          part.channels,
          scratch.gradient.data(),
          slopes_ != nullptr,
          part.grad_input);
      slope.y *= bin.offset_scale_y;
      slope.x *= bin.offset_scale_x;
    }
    keep_slope(part, roi, index, slope);
  }

  template <typename M>
  const S* gradient_of(
      const RoiPart<M, T>& part,
      int64_t roi,
      const BinIndex& bin) const {
    return pooled_.pixel(bin.i, bin.j) + roi * pooled_stride_ +
        part.channel * pooled_.channel_stride;
  }

  template <typename M>
  bool has_finite_gradient(
      const RoiPart<M, T>& part,
      int64_t roi,
      const BinIndex& bin) const {
    T sum = 0; // of zeros, or NaN
    const S* gradient = gradient_of(part, roi, bin);
    for (int64_t c = 0; c < part.channels; ++c) {
      sum += T(0) * static_cast<T>(gradient[c * pooled_.channel_stride]);
    }
    return sum == T(0);
  }

  template <typename M>
  void keep_slope(
      const RoiPart<M, T>& part,
      int64_t roi,
      const BinIndex& bin,
      const BinSlope<T>& slope) const {
    if (slopes_ != nullptr) {
      slopes_->at(
          part.slice, roi - part.first_roi, part.of_class, bin.i, bin.j) =
          slope;
    }
  }

  const RoiSource& source_;
  const RoiPoolShape& shape_;
  const MapView<const S> pooled_; // grad_output of the first RoI
  const int64_t pooled_stride_; // from RoI to RoI
  const BinSlopes<T>* slopes_;
};

} // namespace dcn
