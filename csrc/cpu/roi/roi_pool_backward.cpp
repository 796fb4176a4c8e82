// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Backward pass of RoI pooling. Its tasks are (image, group of bins, slice of
// output channels). Tasks write disjoint parts of grad_input. Offset gradients
// are buffered per bin and slice for a range of RoIs, and then summed in a
// fixed order. So there are no locks and no atomics, and the results have the
// same bits for any number of threads.

#include <algorithm>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/roi/bin_kernels.h"
#include "cpu/roi/offset_grad_buffer.h"
#include "cpu/roi/roi_pool.h"
#include "cpu/roi/window_kernels.h"
#include "ops/backward_tiling.h"

namespace dcn::cpu {
namespace {

constexpr int64_t kMaxSliceChannels = 64;
constexpr int64_t kMinCopiedChannels = 8;
// Budgets: channels-last copies of one slice of the input and its gradient, and
// the copies of all tasks that run at once.
constexpr int64_t kCopyBytes = int64_t{8} << 20;
constexpr int64_t kWorkspaceBytes = int64_t{40} << 20;

// The part of a task in one class: a range of output channels of one group of
// bins.
template <typename M, typename T>
struct BinTask {
  const RoiBoxes<T>& boxes;
  int64_t first_roi; // the first one in the offset gradient buffer
  const std::vector<BinIndex>& bins;
  int64_t slice_of_class; // see OffsetGradBuffer
  int64_t class_index;
  int64_t channel; // of the output; channel 0 of the views
  int64_t channels;
  FeatureMapView<const M> map;
  FeatureMapView<T> grad_input; // not computed if data is null
};

template <typename T>
struct BinWorkspace {
  SeparableWeights<T> y, x;
  BinBatch<T> batch;
  std::vector<T> gradient;
  std::vector<T> batch_gradients; // (channels, kBatchSize)

  BinWorkspace(const RoiPoolShape& shape, int64_t max_channels)
      : y(shape.map.h),
        x(shape.map.w),
        gradient(max_channels),
        batch_gradients(
            has_few_channels_per_class(shape) ? max_channels * kBatchSize : 0) {
  }
};

template <typename M>
FeatureMapView<M> channels_from(FeatureMapView<M> view, int64_t channel) {
  if (view.data != nullptr) {
    view.data += channel * view.channel_stride;
  }
  return view;
}

// Adds the gradients of bins to their pixels, and stores their offset
// gradients.
template <typename S, typename T>
class BinBackward {
 public:
  // No offset gradients are computed if `offset_grads` is null.
  BinBackward(
      const RoiGeometry& geometry,
      const at::Tensor& grad_output,
      const OffsetGradBuffer<T>* offset_grads)
      : geometry_(geometry),
        shape_(geometry.shape),
        pooled_(feature_map_view<const S>(grad_output, 0, 0)),
        pooled_stride_(grad_output.stride(0)),
        offset_grads_(offset_grads) {}

  template <typename M>
  void run(
      const BinTask<M, T>& task,
      const std::vector<int64_t>& rois,
      BinWorkspace<T>& workspace) const {
    for (const int64_t roi : rois) {
      for (const BinIndex& bin : task.bins) {
        run_bin(task, roi, bin, workspace);
      }
    }
  }

  // As run(), the same bin of a batch of RoIs at a time. The views of the task
  // are window planes, and finite.
  void run_batches(
      const BinTask<T, T>& task,
      const BatchedRois<T>& rois,
      BinWorkspace<T>& workspace) const {
    const int64_t count = rois.rois.size();
    for (const BinIndex& bin : task.bins) {
      for (int64_t first = 0; first < count; first += kBatchSize) {
        workspace.batch.locate(geometry_, rois, first, task.class_index, bin);
        run_batch(task, bin, workspace);
      }
    }
    run(task, rois.others, workspace);
  }

 private:
  void run_batch(
      const BinTask<T, T>& task,
      const BinIndex& bin,
      BinWorkspace<T>& workspace) const {
    auto& batch = workspace.batch;
    auto& gradients = workspace.batch_gradients;
    for (int item = 0; item < batch.size; ++item) {
      const S* gradient = gradient_of(task, batch.rois[item], bin);
      T sum = 0; // 0, or NaN if any gradient is not finite
      for (int64_t c = 0; c < task.channels; ++c) {
        const T value = static_cast<T>(gradient[c * pooled_.channel_stride]);
        gradients[c * kBatchSize + item] = value;
        sum += T(0) * value;
      }
      batch.fits[item] = batch.fits[item] && sum == T(0);
    }
    BatchOffsetGrad<T> offset_grad{};
    for (int64_t c = 0; c < task.channels; ++c) {
      backward_batch<T>(
          channels_from(task.map, c),
          batch,
          gradients.data() + c * kBatchSize,
          offset_grads_ != nullptr,
          channels_from(task.grad_input, c),
          offset_grad);
    }
    for (int item = 0; item < batch.size; ++item) {
      if (batch.fits[item]) {
        store_offset_grad(
            task,
            batch.rois[item],
            bin,
            {offset_grad.y[item], offset_grad.x[item]});
      } else {
        run_bin(task, batch.rois[item], bin, workspace);
      }
    }
  }

  template <typename M>
  void run_bin(
      const BinTask<M, T>& task,
      int64_t roi,
      const BinIndex& index,
      BinWorkspace<T>& workspace) const {
    const auto bin =
        geometry_.locate(task.boxes[roi], roi, task.class_index, index);
    OffsetGrad<T> grad{T(0), T(0)};
    T divisor = 0;
    if (bin.state == RoiState::kInside) {
      workspace.y.accumulate(bin.y);
      workspace.x.accumulate(bin.x);
      divisor = bin_divisor(bin.y, bin.x, workspace.y.kept, workspace.x.kept);
    } else if (bin.state == RoiState::kNan) {
      grad.y = grad.x = std::numeric_limits<T>::quiet_NaN();
    }
    if (divisor > T(0)) {
      const S* gradient = gradient_of(task, roi, index);
      for (int64_t c = 0; c < task.channels; ++c) {
        workspace.gradient[c] =
            static_cast<T>(gradient[c * pooled_.channel_stride]) / divisor;
      }
      const auto backward = task.channels < kMinVectorChannels
          ? backward_per_channel<M, T>
          : backward_vectorized<M, T>;
      grad = backward(
          task.map,
          workspace.y,
          workspace.x,
          task.channels,
          workspace.gradient.data(),
          offset_grads_ != nullptr,
          task.grad_input);
      grad.y *= bin.offset_scale_y;
      grad.x *= bin.offset_scale_x;
    }
    store_offset_grad(task, roi, index, grad);
  }

  template <typename M>
  const S* gradient_of(
      const BinTask<M, T>& task,
      int64_t roi,
      const BinIndex& bin) const {
    return pooled_.pixel(bin.i, bin.j) + roi * pooled_stride_ +
        task.channel * pooled_.channel_stride;
  }

  template <typename M>
  void store_offset_grad(
      const BinTask<M, T>& task,
      int64_t roi,
      const BinIndex& bin,
      const OffsetGrad<T>& grad) const {
    if (offset_grads_ != nullptr) {
      offset_grads_->at(
          task.slice_of_class,
          roi - task.first_roi,
          task.class_index,
          bin.i,
          bin.j) = grad;
    }
  }

  const RoiGeometry& geometry_;
  const RoiPoolShape& shape_;
  const FeatureMapView<const S> pooled_; // grad_output of RoI 0
  const int64_t pooled_stride_; // from RoI to RoI
  const OffsetGradBuffer<T>* offset_grads_;
};

template <typename S, typename T>
class Backward {
 public:
  Backward(
      const RoiGeometry& geometry,
      const at::Tensor& grad_output,
      const at::Tensor& input,
      const RoiPoolGradients& gradients)
      : geometry_(geometry),
        shape_(geometry.shape),
        input_(input),
        wants_input_(gradients.input.numel() > 0),
        maps_(geometry.shape, input),
        grad_maps_(geometry.shape, wants_input_ ? gradients.input : input),
        gradients_(gradients),
        wants_offset_(gradients.offset.numel() > 0),
        bins_of_groups_(bins_of_groups(geometry)),
        tiling_(
            has_few_channels_per_class(shape_)
                ? window_planes_size(shape_.map, 1)
                : shape_.map.count(),
            shape_.channels,
            has_few_channels_per_class(shape_) ||
                (wants_offset_ && !reads_in_place()),
            wants_input_ && !reads_in_place(),
            std::is_same_v<S, T>,
            {has_few_channels_per_class(shape_) ? shape_.channels_per_class()
                                                : kMaxSliceChannels,
             kMinCopiedChannels,
             kCopyBytes,
             sizeof(T),
             sizeof(T)}),
        pools_windows_(
            has_few_channels_per_class(shape_) && tiling_.copies_input &&
            tiling_.copies_grad == wants_input_),
        offset_grads_(geometry, tiling_.slice_channels, wants_offset_),
        bin_backward_(
            geometry,
            grad_output,
            wants_offset_ ? &offset_grads_ : nullptr) {}

  void run() {
    if (wants_input_) {
      gradients_.input.zero_();
    }
    const int64_t groups = shape_.groups.count();
    const int64_t tasks = shape_.batch * offset_grads_.slices() * groups;
    const int64_t workers = std::min<int64_t>(
        tasks,
        std::clamp<int64_t>(
            kWorkspaceBytes / std::max<int64_t>(tiling_.copy_bytes, 1),
            1,
            at::get_num_threads()));
    for (int64_t first = 0; first < shape_.rois;
         first += offset_grads_.max_rois()) {
      const int64_t last =
          std::min(first + offset_grads_.max_rois(), shape_.rois);
      const RoiBoxes<T> boxes(geometry_, first, last);
      std::vector<BatchedRois<T>> batched_rois;
      for (int64_t image = 0; pools_windows_ && image < shape_.batch; ++image) {
        batched_rois.emplace_back(shape_, boxes, boxes.of_images(image, 1));
      }
      parallel_tasks(workers, [&](int64_t begin, int64_t end) {
        Workspace workspace(*this);
        for (int64_t worker = begin; worker < end; ++worker) {
          for (int64_t task = worker; task < tasks; task += workers) {
            const Task next{
                task / groups / offset_grads_.slices(),
                static_cast<int>(task % groups),
                task / groups % offset_grads_.slices(),
                first,
                boxes,
                batched_rois};
            if (pools_windows_) {
              run_class_task(next, workspace);
            } else {
              run_task(next, workspace);
            }
          }
        }
      });
      if (wants_offset_) {
        offset_grads_.store(first, last, AnyDtypeView(gradients_.offset));
      }
    }
  }

 private:
  struct Task {
    int64_t image;
    int group;
    int64_t slice;
    int64_t first_roi; // in the offset gradient buffer
    const RoiBoxes<T>& boxes;
    const std::vector<BatchedRois<T>>& batched_rois; // of each image
  };

  struct Workspace {
    BinWorkspace<T> bins;
    std::unique_ptr<T[]> input, grad_input; // see copy_size()

    explicit Workspace(const Backward& pass)
        : bins(pass.shape_, pass.tiling_.slice_channels) {
      const int64_t size = pass.copy_size(pass.tiling_.slice_channels);
      input.reset(pass.tiling_.copies_input ? new T[size]() : nullptr);
      grad_input.reset(pass.tiling_.copies_grad ? new T[size] : nullptr);
    }
  };

  // Elements of a copy of the map: window planes or (H, W, channels).
  int64_t copy_size(int64_t channels) const {
    return pools_windows_ ? window_planes_size(shape_.map, channels)
                          : shape_.map.count() * channels;
  }

  // Whether the channels of a bin are contiguous in the input and its gradient,
  // and in the accumulator's dtype.
  bool reads_in_place() const {
    return std::is_same_v<S, T> && shape_.groups.count() == 1 &&
        !has_few_channels_per_class(shape_) &&
        memory_format_of(input_) == at::MemoryFormat::ChannelsLast;
  }

  void run_task(const Task& task, Workspace& workspace) const {
    const int64_t channel = task.slice * tiling_.slice_channels;
    const int64_t channels =
        std::min(tiling_.slice_channels, shape_.channels - channel);
    const auto rois = task.boxes.of_images(task.image, 1);
    if (rois.empty()) {
      return;
    }
    const auto view_of = [&](auto* data) {
      return channels_last_view(data, shape_.map.w, channels);
    };
    FeatureMapView<T> grad_input{nullptr, 0, 0, 0};
    if (tiling_.copies_grad) {
      std::fill_n(
          workspace.grad_input.get(), shape_.map.count() * channels, T(0));
      grad_input = view_of(workspace.grad_input.get());
    } else if (wants_input_) {
      if constexpr (std::is_same_v<S, T>) { // else it is copied
        grad_input = grad_maps_(task.image, task.group, channel);
      }
    }
    const auto map = maps_(task.image, task.group, channel);
    if (tiling_.copies_input) {
      copy_rows(
          map,
          view_of(workspace.input.get()),
          0,
          shape_.map.h,
          shape_.map.w,
          channels);
      run_rois<T>(
          task,
          rois,
          view_of(static_cast<const T*>(workspace.input.get())),
          grad_input,
          workspace);
    } else {
      run_rois<S>(task, rois, map, grad_input, workspace);
    }
    if (tiling_.copies_grad) {
      copy_rows<const T, S, true>(
          view_of(static_cast<const T*>(workspace.grad_input.get())),
          grad_maps_(task.image, task.group, channel),
          0,
          shape_.map.h,
          shape_.map.w,
          channels);
    }
  }

  // Pools few channels of one class, from planes.
  void run_class_task(const Task& task, Workspace& workspace) const {
    const auto& rois = task.batched_rois[task.image];
    if (rois.rois.empty() && rois.others.empty()) {
      return;
    }
    const int64_t channel = task.slice * tiling_.slice_channels;
    const int64_t channels =
        std::min(tiling_.slice_channels, shape_.channels - channel);
    const int64_t class_index = channel / shape_.channels_per_class();
    const auto planes = window_planes_view(workspace.input.get(), shape_.map);
    copy_planes(
        maps_(task.image, task.group, channel), planes, channels, shape_.map);
    FeatureMapView<T> grad_input{nullptr, 0, 0, 0};
    if (wants_input_) {
      std::fill_n(workspace.grad_input.get(), copy_size(channels), T(0));
      grad_input = window_planes_view(workspace.grad_input.get(), shape_.map);
    }
    const BinTask<T, T> bins{
        task.boxes,
        task.first_roi,
        bins_of_groups_[task.group],
        offset_grads_.slice_of_class(task.slice, class_index),
        class_index,
        channel,
        channels,
        const_view(planes),
        grad_input};
    if (are_finite<T>(planes.data, copy_size(channels))) {
      bin_backward_.run_batches(bins, rois, workspace.bins);
    } else {
      bin_backward_.run(bins, rois.rois, workspace.bins);
      bin_backward_.run(bins, rois.others, workspace.bins);
    }
    if (wants_input_) {
      copy_planes<const T, S, true>(
          const_view(grad_input),
          grad_maps_(task.image, task.group, channel),
          channels,
          shape_.map);
    }
  }

  template <typename M>
  void run_rois(
      const Task& task,
      const std::vector<int64_t>& rois,
      const FeatureMapView<const M>& map,
      const FeatureMapView<T>& grad_input,
      Workspace& workspace) const {
    const int64_t channel = task.slice * tiling_.slice_channels;
    const int64_t stop =
        std::min(channel + tiling_.slice_channels, shape_.channels);
    const int64_t per_class = shape_.channels_per_class();
    for (int64_t from = channel; from < stop;) {
      const int64_t class_index = from / per_class;
      const int64_t to = std::min((class_index + 1) * per_class, stop);
      bin_backward_.run(
          BinTask<M, T>{
              task.boxes,
              task.first_roi,
              bins_of_groups_[task.group],
              offset_grads_.slice_of_class(task.slice, class_index),
              class_index,
              from,
              to - from,
              channels_from(map, from - channel),
              channels_from(grad_input, from - channel)},
          rois,
          workspace.bins);
      from = to;
    }
  }

  const RoiGeometry& geometry_;
  const RoiPoolShape& shape_;
  const at::Tensor& input_;
  bool wants_input_;
  const GroupedMaps<const S> maps_;
  const GroupedMaps<S> grad_maps_; // if wants_input_
  const RoiPoolGradients& gradients_;
  bool wants_offset_;
  const std::vector<std::vector<BinIndex>> bins_of_groups_;
  ChannelTiling tiling_;
  bool pools_windows_; // of few channels per class, unless a map is too large
  OffsetGradBuffer<T> offset_grads_;
  const BinBackward<S, T> bin_backward_;
};

} // namespace

template <typename S, typename T>
void roi_pool_backward(
    const RoiGeometry& geometry,
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const RoiPoolGradients& gradients) {
  Backward<S, T>(geometry, grad_output, input, gradients).run();
}

#define DCN_INSTANTIATE_BACKWARD(S, T)   \
  template void roi_pool_backward<S, T>( \
      const RoiGeometry&,                \
      const at::Tensor&,                 \
      const at::Tensor&,                 \
      const RoiPoolGradients&);

DCN_INSTANTIATE_BACKWARD(double, double)
DCN_INSTANTIATE_BACKWARD(float, float)
DCN_INSTANTIATE_BACKWARD(c10::Half, float)
DCN_INSTANTIATE_BACKWARD(c10::BFloat16, float)
#undef DCN_INSTANTIATE_BACKWARD

} // namespace dcn::cpu
