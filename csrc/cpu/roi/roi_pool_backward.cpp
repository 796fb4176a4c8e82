// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// The backward pass is cut into tasks (image, group of bins, slice of output
// channels), each of which owns what it adds to grad_input. What it finds for
// the offsets is kept per bin and slice, and summed in a fixed order at the end
// of each chunk of RoIs.

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/roi/roi_backward_bins.h"
#include "ops/copy_plan.h"

namespace dcn::cpu {
namespace {

constexpr int64_t kWidestSlice = 64;
constexpr int64_t kNarrowestCopy = 8;
// Copies of one slice, of the input and of its gradient.
constexpr int64_t kCopyBytes = int64_t{8} << 20;
// The copies of all tasks that run at once.
constexpr int64_t kWorkspaceBytes = int64_t{40} << 20;

template <typename S, typename T>
class Backward {
 public:
  Backward(
      const RoiGeometry& source,
      const at::Tensor& grad_output,
      const at::Tensor& input,
      const RoiPoolGradients& gradients)
      : source_(source),
        shape_(source.shape),
        input_(input),
        wants_input_(gradients.input.numel() > 0),
        maps_(source.shape, input),
        grad_maps_(source.shape, wants_input_ ? gradients.input : input),
        gradients_(gradients),
        wants_offset_(gradients.offset.numel() > 0),
        bins_of_(bins_of_groups(source)),
        tiling_(
            shape_.map.count(),
            shape_.channels,
            wants_offset_ && !reads_in_place() &&
                !has_few_channels_per_class(shape_),
            wants_input_ && !reads_in_place() &&
                !(has_few_channels_per_class(shape_) && std::is_same_v<S, T>),
            std::is_same_v<S, T>,
            {has_few_channels_per_class(shape_) ? shape_.channels_per_class()
                                                : kWidestSlice,
             kNarrowestCopy,
             kCopyBytes,
             sizeof(T),
             sizeof(T)}),
        offset_grads_(source, tiling_.widest, wants_offset_),
        bins_(source, grad_output, wants_offset_ ? &offset_grads_ : nullptr) {}

  void run() {
    if (wants_input_) {
      gradients_.input.zero_();
    }
    const int64_t groups = shape_.groups.count();
    const int64_t tasks = shape_.batch * groups * offset_grads_.slices();
    const int64_t workers = std::min<int64_t>(
        tasks,
        std::clamp<int64_t>(
            kWorkspaceBytes / std::max<int64_t>(tiling_.image_bytes, 1),
            1,
            at::get_num_threads()));
    for (int64_t first = 0; first < shape_.rois;
         first += offset_grads_.max_rois()) {
      const int64_t last =
          std::min(first + offset_grads_.max_rois(), shape_.rois);
      const RoiBoxes<T> boxes(source_, first, last);
      parallel_tasks(workers, [&](int64_t begin, int64_t end) {
        Workspace workspace(*this);
        for (int64_t worker = begin; worker < end; ++worker) {
          for (int64_t task = worker; task < tasks; task += workers) {
            run_task(
                {task / offset_grads_.slices() / groups,
                 static_cast<int>(task / offset_grads_.slices() % groups),
                 task % offset_grads_.slices(),
                 first,
                 boxes},
                workspace);
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
    int64_t first; // RoI of the chunk
    const RoiBoxes<T>& boxes; // of the chunk
  };

  struct Workspace {
    BinWorkspace<T> bins;
    std::unique_ptr<T[]> input, grad_input; // (H, W, slice)

    explicit Workspace(const Backward& pass)
        : bins(pass.shape_, pass.tiling_.widest) {
      const int64_t size = pass.shape_.map.count() * pass.tiling_.widest;
      input.reset(pass.tiling_.copies_input ? new T[size] : nullptr);
      grad_input.reset(pass.tiling_.copies_grad ? new T[size] : nullptr);
    }
  };

  // Whether the channels of a bin are neighbours in memory, in the dtype of the
  // sums, in the input and so in its gradient.
  bool reads_in_place() const {
    return std::is_same_v<S, T> && shape_.groups.count() == 1 &&
        memory_format_of(input_) == at::MemoryFormat::ChannelsLast;
  }

  void run_task(const Task& task, Workspace& workspace) const {
    const int64_t channel = task.slice * tiling_.widest;
    const int64_t channels =
        std::min(tiling_.widest, shape_.channels - channel);
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
      if constexpr (std::is_same_v<S, T>) { // or a copy would be made
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

  template <typename M>
  void run_rois(
      const Task& task,
      const std::vector<int64_t>& rois,
      const FeatureMapView<const M>& map,
      const FeatureMapView<T>& grad_input,
      Workspace& workspace) const {
    const int64_t channel = task.slice * tiling_.widest;
    const int64_t stop = std::min(channel + tiling_.widest, shape_.channels);
    const int64_t per_class = shape_.channels_per_class();
    for (int64_t from = channel; from < stop;) {
      const int64_t class_index = from / per_class;
      const int64_t to = std::min((class_index + 1) * per_class, stop);
      bins_.run(
          BackwardBins<M, T>{
              task.boxes,
              task.first,
              bins_of_[task.group],
              task.slice,
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

  const RoiGeometry& source_;
  const RoiPoolShape& shape_;
  const at::Tensor& input_;
  bool wants_input_;
  const GroupedMaps<const S> maps_;
  const GroupedMaps<S> grad_maps_; // if wants_input_
  const RoiPoolGradients& gradients_;
  bool wants_offset_;
  const std::vector<std::vector<BinIndex>> bins_of_; // each group
  ChannelTiling tiling_;
  OffsetGradBuffer<T> offset_grads_;
  const BinBackward<S, T> bins_;
};

} // namespace

template <typename S, typename T>
void roi_pool_backward(
    const RoiGeometry& source,
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const RoiPoolGradients& gradients) {
  Backward<S, T>(source, grad_output, input, gradients).run();
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
