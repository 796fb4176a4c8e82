// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// The gradients of a task of the backward pass, block by block of output
// positions:
//   GEMM    grad_columns = grad_output * weight
//   col2im  gradients of input, offset and mask; recomputes the columns
//   GEMM    grad_weight += grad_output^T * columns
#pragma once

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/channels_last_copy.h"
#include "cpu/conv/backward_tiling.h"
#include "cpu/conv/deform_im2col.h"
#include "cpu/conv/grad_output_tile.h"
#include "cpu/conv/packed_weight.h"

namespace dcn::cpu {

// Which gradients are computed.
struct WantedGradients {
  bool input;
  bool offset; // or the mask
  bool weight;

  // Whether the gradient of the columns is needed.
  bool columns() const {
    return input || offset;
  }
  bool any() const {
    return columns() || weight;
  }
};

template <typename S, typename T, typename C>
class BlockGradients {
 public:
  // An image, a tile of output positions and a slice of input channels.
  struct Task {
    int64_t image;
    int64_t tile;
    int64_t slice;
    int64_t begin; // output positions
    int64_t end;
  };

  // A block of output positions of a task.
  struct Block {
    Buffer<T> columns; // and their gradient: (block, taps, slice)
    // Apart from their gradient, if that is used later.
    Buffer<T> separate_columns;
    Buffer<C> vnni_columns; // the same, if C has the VNNI layout
    std::unique_ptr<SamplingPlan<T>> plan;
    // For grad_input, if its strides differ from those of the input.
    std::unique_ptr<SamplingPlan<T>> grad_plan;
    int64_t begin; // output positions
    int64_t end;
  };

  // Buffers and results of one task.
  struct Workspace {
    Buffer<T> input; // channels-last copy of the slice
    Buffer<T> grad_input; // likewise
    Buffer<T> grad_weight; // (group_out, taps, slice) if summed
    Buffer<T> grad_taps; // (taps, 3, positions): dy, dx, mask
    std::vector<Block> blocks; // that are in work
  };

  BlockGradients(
      const BackwardInputs& inputs,
      const at::Tensor& weight,
      const at::Tensor& grad_input,
      const WantedGradients& wanted,
      const BackwardTiling& tiling,
      const GradOutputTile<S, C>& grad_output)
      : inputs_(inputs),
        shape_(inputs.shape),
        grad_input_(grad_input),
        wanted_(wanted),
        tiling_(tiling),
        grad_output_(grad_output),
        offsets_(conv_offsets(inputs.shape, inputs.offset, inputs.mask)) {
    if (wanted.columns()) {
      weight_ =
          pack_backward_weight<S, C>(weight, shape_, tiling.channels.slices);
    }
  }

  // The columns of the tile of a block.
  int64_t depth(int64_t slice) const {
    return shape_.geometry.taps() * tiling_.channels.slices[slice].size;
  }

  // For a task that `threads` threads share, each with a block.
  Workspace make_workspace(int64_t threads) const {
    const auto& g = shape_.geometry;
    const int64_t channels = tiling_.channels.slice_channels;
    const int64_t copy = int64_t{g.in_h} * g.in_w * channels;
    Workspace workspace;
    workspace.input = buffer<T>(tiling_.channels.copies_input, copy);
    workspace.grad_input = buffer<T>(tiling_.channels.copies_grad, copy);
    workspace.grad_weight = buffer<T>(
        wanted_.weight && tiling_.sums_weight,
        shape_.group_out() * g.taps() * channels);
    workspace.grad_taps =
        buffer<T>(wanted_.offset, tiling_.tile * g.taps() * 3);
    for (int64_t i = 0; i < threads; ++i) {
      workspace.blocks.push_back(make_block(threads > 1));
    }
    return workspace;
  }

  // Rows [begin, end) of the copies before the blocks.
  void load_rows(
      const Task& task,
      Workspace& workspace,
      int64_t begin,
      int64_t end) const {
    const auto& g = shape_.geometry;
    const auto& channels = slice(task);
    const int64_t row = g.in_w * channels.size;
    if (tiling_.channels.copies_grad) {
      std::fill(
          workspace.grad_input.get() + begin * row,
          workspace.grad_input.get() + end * row,
          T(0));
    }
    if (tiling_.channels.copies_input) {
      copy_rows(
          feature_map_view<const S>(inputs_.input, task.image, channels.begin),
          channels_last_view(workspace.input.get(), g.in_w, channels.size),
          begin,
          end,
          g.in_w,
          channels.size);
    }
  }

  // Rows [begin, end) of the copies after the blocks.
  void store_rows(
      const Task& task,
      const Workspace& workspace,
      int64_t begin,
      int64_t end) const {
    if (!tiling_.channels.copies_grad) {
      return;
    }
    const auto& g = shape_.geometry;
    const auto& channels = slice(task);
    const auto from = channels_last_view<const T>(
        workspace.grad_input.get(), g.in_w, channels.size);
    const auto to =
        feature_map_view<S>(grad_input_, task.image, channels.begin);
    if (task.tile == 0) {
      copy_rows(from, to, begin, end, g.in_w, channels.size);
    } else {
      copy_rows<const T, S, true>(from, to, begin, end, g.in_w, channels.size);
    }
  }

  // The gradients of a block: all but that of the weight, and that of the input
  // unless the threads of the task share it.
  void run_block(const Task& task, Workspace& workspace, Block& block) const {
    const auto& channels = slice(task);
    if (tiling_.channels.copies_input) {
      run_block<T>(
          task,
          channels_last_view<const T>(
              workspace.input.get(), shape_.geometry.in_w, channels.size),
          workspace,
          block);
    } else {
      run_block<S>(
          task,
          feature_map_view<const S>(inputs_.input, task.image, channels.begin),
          workspace,
          block);
    }
  }

  // Adds the contribution of a block to channels [begin, end) of the gradient
  // of the input, which the threads of the task share.
  void add_grad_input(
      const Task& task,
      const Workspace& workspace,
      const Block& block,
      int64_t begin,
      int64_t end) const {
    const auto grad_input = grad_map(task, workspace);
    if (grad_input.data != nullptr && begin < end) {
      deform_col2im(
          block.grad_plan ? *block.grad_plan : *block.plan,
          tile_of(task, block),
          begin,
          end,
          grad_input);
    }
  }

  // Adds the contribution of a block to `grad_weight`, (group_out, taps *
  // slice), of outputs [begin, end) of the group.
  void add_grad_weight(
      const Task& task,
      const Block& block,
      int64_t begin,
      int64_t end,
      T* grad_weight) const {
    if (begin == end) {
      return;
    }
    const auto& channels = slice(task);
    const int64_t width = depth(task.slice);
    const auto grad_output = grad_output_.channel_major(
        task.image, channels.group, block.begin, block.end);
    Matrix<const C> columns{nullptr, grad_output.columns, width, width};
    if constexpr (OperandLayout<C>::kVnni) {
      columns.data = block.vnni_columns.get();
    } else {
      columns.data = columns_of(block);
    }
    gemm(
        Matrix<const C>{
            grad_output.data + begin * grad_output.stride,
            end - begin,
            grad_output.columns,
            grad_output.stride},
        columns,
        Matrix<T>{grad_weight + begin * width, end - begin, width, width},
        block.begin == task.begin ? Store::kOverwrite : Store::kAdd);
  }

 private:
  const ChannelSlice& slice(const Task& task) const {
    return tiling_.channels.slices[task.slice];
  }

  Block make_block(bool is_shared) const {
    const int64_t columns = tiling_.block * shape_.geometry.taps() *
        tiling_.channels.slice_channels;
    Block block;
    block.columns = buffer<T>(true, columns);
    block.separate_columns = buffer<T>(is_shared && wanted_.weight, columns);
    block.vnni_columns =
        buffer<C>(OperandLayout<C>::kVnni && wanted_.weight, columns);
    block.plan = std::make_unique<SamplingPlan<T>>(offsets_, tiling_.block);
    return block;
  }

  template <typename E>
  static Buffer<E> buffer(bool needed, int64_t size) {
    return needed ? make_buffer<E>(size) : nullptr;
  }

  // Where the gradient of the slice accumulates; null if it is not wanted.
  FeatureMapView<T> grad_map(const Task& task, const Workspace& workspace)
      const {
    const auto& channels = slice(task);
    if (tiling_.channels.copies_grad) {
      return channels_last_view(
          workspace.grad_input.get(), shape_.geometry.in_w, channels.size);
    }
    // With another accumulator dtype there would be a copy.
    if constexpr (std::is_same_v<S, T>) {
      if (wanted_.input) {
        return feature_map_view<T>(grad_input_, task.image, channels.begin);
      }
    }
    return {nullptr, 0, 0, 0};
  }

  Im2colTile<T> tile_of(const Task& task, const Block& block) const {
    const auto& channels = slice(task);
    return {
        block.columns.get(),
        block.end - block.begin,
        shape_.geometry.taps(),
        channels.size,
        depth(task.slice)};
  }

  // `map` is the slice of the input, in dtype M.
  template <typename M>
  void run_block(
      const Task& task,
      const FeatureMapView<const M>& map,
      Workspace& workspace,
      Block& block) const {
    const FeatureMapView<T> grad_input = grad_map(task, workspace);
    const int64_t threads = static_cast<int64_t>(workspace.blocks.size());
    compute_taps(
        task, map, grad_input, block.begin + threads * tiling_.block, block);
    if (wanted_.columns()) {
      compute_grad_columns(task, block);
    }
    Im2colGradients<T> gradients{
        {nullptr, 0, 0, 0},
        block.grad_plan ? block.grad_plan.get() : block.plan.get(),
        wanted_.offset,
        wanted_.weight ? columns_of(block) : nullptr};
    if (threads == 1) {
      gradients.input = grad_input;
    }
    deform_im2col_backward<M, T>(
        map, *block.plan, tile_of(task, block), gradients);
    if (wanted_.offset) {
      block.plan->compute_gradients(
          workspace.grad_taps.get() + block.begin - task.begin,
          task.end - task.begin);
    }
    if (wanted_.weight) {
      finish_columns(task, block);
    }
  }

  // For the strides of the map, and for those of the gradient of the input if
  // they are others. The thread's next block begins at `next`.
  template <typename M>
  void compute_taps(
      const Task& task,
      const FeatureMapView<const M>& map,
      const FeatureMapView<T>& grad_input,
      int64_t next,
      Block& block) const {
    const int64_t offset_group = slice(task).offset_group;
    block.plan->select(task.image, block.begin, block.end);
    block.plan->compute(
        offset_group,
        map.row_stride,
        map.column_stride,
        {offset_group,
         std::min(next, task.end),
         std::min(next + tiling_.block, task.end)});
    if (grad_input.data == nullptr ||
        (map.row_stride == grad_input.row_stride &&
         map.column_stride == grad_input.column_stride)) {
      return;
    }
    if (!block.grad_plan) {
      block.grad_plan =
          std::make_unique<SamplingPlan<T>>(offsets_, tiling_.block);
    }
    block.grad_plan->select(task.image, block.begin, block.end);
    block.grad_plan->compute(
        offset_group,
        grad_input.row_stride,
        grad_input.column_stride,
        {offset_group, task.end, task.end});
  }

  void compute_grad_columns(const Task& task, const Block& block) const {
    const int64_t width = depth(task.slice);
    const auto grad_output = grad_output_.position_major(
        task.image, slice(task).group, block.begin, block.end);
    gemm(
        grad_output,
        Matrix<const C>{
            weight_[task.slice].template data_ptr<C>(),
            grad_output.columns,
            width,
            width},
        Matrix<T>{block.columns.get(), grad_output.rows, width, width},
        Store::kOverwrite);
  }

  static T* columns_of(const Block& block) {
    return block.separate_columns ? block.separate_columns.get()
                                  : block.columns.get();
  }

  // The columns as the GEMM reads them.
  void finish_columns(const Task& task, const Block& block) const {
    const int64_t width = depth(task.slice);
    const int64_t positions = block.end - block.begin;
    const int64_t padded = grad_output_.padded_block(positions);
    std::fill_n(
        columns_of(block) + positions * width,
        (padded - positions) * width,
        T(0));
    if constexpr (OperandLayout<C>::kVnni) {
      pack_vnni(columns_of(block), padded, width, block.vnni_columns.get());
    }
  }

  BackwardInputs inputs_;
  const DeformConvShape& shape_;
  at::Tensor grad_input_;
  WantedGradients wanted_;
  const BackwardTiling& tiling_;
  const GradOutputTile<S, C>& grad_output_;
  ConvOffsets offsets_;
  std::vector<at::Tensor> weight_; // packed, per slice
};

} // namespace dcn::cpu
