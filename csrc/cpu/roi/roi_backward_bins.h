// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include <limits>
#include <vector>

#include "cpu/roi/offset_grad_buffer.h"
#include "cpu/roi/roi_pool.h"
#include "cpu/roi/roi_pool_batched.h"
#include "cpu/roi/roi_pool_per_channel.h"

namespace dcn::cpu {

// What one task of the backward pass adds to: some output channels, all of one
// class, of one group of bins.
template <typename M, typename T>
struct BackwardBins {
  const RoiBoxes<T>& boxes;
  int64_t first_roi; // of the chunk whose slopes are kept
  const std::vector<BinIndex>& bins;
  int64_t slice;
  int64_t class_index;
  int64_t channel; // of the output; the first of the views
  int64_t channels;
  FeatureMapView<const M> map;
  FeatureMapView<T> grad_input; // data null: not wanted
};

template <typename T>
struct BinWorkspace {
  SeparableWeights<T> y, x;
  BinBatch<T> batch;
  std::vector<T> gradient;

  BinWorkspace(const RoiPoolShape& shape, int64_t widest)
      : y(shape.map.h), x(shape.map.w), gradient(widest) {}
};

template <typename M>
FeatureMapView<M> channels_from(FeatureMapView<M> view, int64_t channel) {
  if (view.data != nullptr) {
    view.data += channel * view.channel_stride;
  }
  return view;
}

// Adds the gradients of bins to their pixels, and keeps the slopes.
template <typename S, typename T>
class BinBackward {
 public:
  // `slopes` may be null: not wanted.
  BinBackward(
      const RoiGeometry& source,
      const at::Tensor& grad_output,
      const OffsetGradBuffer<T>* offset_grads)
      : source_(source),
        shape_(source.shape),
        pooled_(feature_map_view<const S>(grad_output, 0, 0)),
        pooled_stride_(grad_output.stride(0)),
        offset_grads_(offset_grads) {}

  template <typename M>
  void run(
      const BackwardBins<M, T>& part,
      const std::vector<int64_t>& rois,
      BinWorkspace<T>& workspace) const {
    if (has_few_channels_per_class(shape_) &&
        is_finite(part.map, part.channels, shape_.map.h, shape_.map.w)) {
      run_batched(part, rois, workspace);
      return;
    }
    for (const int64_t roi : rois) {
      for (const BinIndex& bin : part.bins) {
        run_bin(part, roi, bin, workspace);
      }
    }
  }

 private:
  // The same bin of several RoIs at a time.
  template <typename M>
  void run_batched(
      const BackwardBins<M, T>& part,
      const std::vector<int64_t>& rois,
      BinWorkspace<T>& workspace) const {
    auto& batch = workspace.batch;
    for (const BinIndex& bin : part.bins) {
      for (const int64_t roi : rois) {
        const auto located =
            source_.locate(part.boxes[roi], roi, part.class_index, bin);
        if (!has_finite_gradient(part, roi, bin) ||
            !batch.try_add(roi, located)) {
          run_bin(part, roi, bin, workspace);
        } else if (batch.full()) {
          flush_batch(part, bin, batch);
        }
      }
      flush_batch(part, bin, batch);
    }
  }

  template <typename M>
  void flush_batch(
      const BackwardBins<M, T>& part,
      const BinIndex& bin,
      BinBatch<T>& batch) const {
    batch.compute_samples(shape_);
    for (int item = 0; item < batch.size; ++item) {
      OffsetGrad<T> dweight{T(0), T(0)};
      const T divisor = batch.divisor(shape_.mode, item);
      const S* gradient = gradient_of(part, batch.roi[item], bin);
      for (int64_t c = 0; divisor > T(0) && c < part.channels; ++c) {
        const auto found = backward_batched<M>(
            channels_from(part.map, c),
            batch,
            item,
            static_cast<T>(gradient[c * pooled_.channel_stride]) / divisor,
            offset_grads_ != nullptr,
            channels_from(part.grad_input, c));
        dweight.y += found.y;
        dweight.x += found.x;
      }
      dweight.y *= batch.offset_scale_y[item];
      dweight.x *= batch.offset_scale_x[item];
      store_offset_grad(part, batch.roi[item], bin, dweight);
    }
    batch.size = 0;
  }

  template <typename M>
  void run_bin(
      const BackwardBins<M, T>& part,
      int64_t roi,
      const BinIndex& index,
      BinWorkspace<T>& workspace) const {
    const auto bin =
        source_.locate(part.boxes[roi], roi, part.class_index, index);
    OffsetGrad<T> dweight{T(0), T(0)};
    T divisor = 0;
    if (bin.state == RoiState::kInside) {
      workspace.y.sum(bin.y);
      workspace.x.sum(bin.x);
      divisor = bin_divisor(bin.y, bin.x, workspace.y.kept, workspace.x.kept);
    } else if (bin.state == RoiState::kNan) {
      dweight.y = dweight.x = std::numeric_limits<T>::quiet_NaN();
    }
    if (divisor > T(0)) {
      const S* gradient = gradient_of(part, roi, index);
      for (int64_t c = 0; c < part.channels; ++c) {
        workspace.gradient[c] =
            static_cast<T>(gradient[c * pooled_.channel_stride]) / divisor;
      }
      const auto backward = part.channels < kMinVectorChannels
          ? backward_per_channel<M, T>
          : backward_vectorized<M, T>;
      dweight = backward(
          part.map,
          workspace.y,
          workspace.x,
          part.channels,
          workspace.gradient.data(),
          offset_grads_ != nullptr,
          part.grad_input);
      dweight.y *= bin.offset_scale_y;
      dweight.x *= bin.offset_scale_x;
    }
    store_offset_grad(part, roi, index, dweight);
  }

  template <typename M>
  const S* gradient_of(
      const BackwardBins<M, T>& part,
      int64_t roi,
      const BinIndex& bin) const {
    return pooled_.pixel(bin.i, bin.j) + roi * pooled_stride_ +
        part.channel * pooled_.channel_stride;
  }

  template <typename M>
  bool has_finite_gradient(
      const BackwardBins<M, T>& part,
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
  void store_offset_grad(
      const BackwardBins<M, T>& part,
      int64_t roi,
      const BinIndex& bin,
      const OffsetGrad<T>& dweight) const {
    if (offset_grads_ != nullptr) {
      offset_grads_->at(
          part.slice, roi - part.first_roi, part.class_index, bin.i, bin.j) =
          dweight;
    }
  }

  const RoiGeometry& source_;
  const RoiPoolShape& shape_;
  const FeatureMapView<const S> pooled_; // grad_output of the first RoI
  const int64_t pooled_stride_; // from RoI to RoI
  const OffsetGradBuffer<T>* offset_grads_;
};

} // namespace dcn::cpu
