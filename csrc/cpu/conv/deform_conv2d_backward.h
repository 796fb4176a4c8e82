// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include <memory>
#include <vector>

#include "cpu/conv/backward_plan.h"
#include "cpu/conv/deform_im2col.h"
#include "cpu/conv/grad_output.h"

namespace dcn::cpu {

// A task's own workspace and results.
template <typename T, typename C>
struct TaskWorkspace {
  std::unique_ptr<T[]> input; // channels-last slice of the input
  std::unique_ptr<T[]> grad_input; // the same of its gradient
  std::unique_ptr<T[]> columns; // (block, taps, slice)
  std::unique_ptr<C[]> pairs; // the same in pairs of rows, if C goes in pairs
  std::unique_ptr<DeformTap<T>[]> taps; // (block, taps)
  std::unique_ptr<T[]> grad_weight; // (group_out, taps, slice)
  std::unique_ptr<T[]> grad_taps; // (tile, taps, 3): dy, dx, mask
};

// S is the dtype of the tensors, T that of the sums, C that of what is
// multiplied.
template <typename S, typename T, typename C>
class DeformConvBackward {
 public:
  DeformConvBackward(
      const BackwardInputs& inputs,
      const at::Tensor& weight,
      const DeformConvGradients& gradients);

  void run();

 private:
  struct Task {
    int64_t image;
    int64_t tile;
    int64_t slice;
    int64_t begin; // output positions
    int64_t end;
  };

  using Workspace = TaskWorkspace<T, C>;

  Workspace make_workspace() const;
  void run_images(
      int64_t tile,
      int64_t first,
      int64_t count,
      std::vector<Workspace>& workspaces);
  void run_task(const Task& task, Workspace& workspace) const;
  template <typename M>
  void run_blocks(
      const Task& task,
      const FeatureMapView<const M>& map,
      Workspace& workspace) const;
  void accumulate_grad_weight(
      const Task& task,
      int64_t from,
      int64_t to,
      Workspace& workspace) const;
  void add_grad_weight(const Task& task, const Workspace& workspace);
  void add_grad_taps(const Task& task, const Workspace& workspace);
  void store_grad_taps(const Task& task) const;
  void store_grad_weight() const;

  const ChannelSlice& slice(const Task& task) const {
    return tiling_.channels.slices[task.slice];
  }
  int64_t depth(const ChannelSlice& slice) const {
    return shape_.geometry.taps() * slice.size;
  }

  BackwardInputs inputs_;
  const DeformConvShape& shape_;
  DeformConvGradients gradients_;
  ConvOffsetGradients tap_gradients_;
  bool wants_input_;
  bool wants_taps_;
  bool wants_weight_;
  GradOutputTile<S, C> grad_output_;
  BackwardTiling tiling_;
  ConvOffsets taps_;
  std::vector<at::Tensor> weight_; // per slice (group_out, taps * size), packed
  std::vector<at::Tensor> grad_weight_; // likewise, not packed, in T
  std::vector<T> grad_taps_; // of the tile and offset group in progress
};

} // namespace dcn::cpu
