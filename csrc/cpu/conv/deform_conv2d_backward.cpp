// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Backward pass. Its tasks are (image, tile of output positions, slice of input
// channels). A task writes its part of grad_input directly. Its contributions
// to the gradients of weight, offset and mask go to its workspace and are
// reduced in task order. So there are no locks and no atomics, and the results
// have the same bits for any number of threads.
//
// A task, block by block of output positions:
//   GEMM    grad_columns = grad_output * weight
//   col2im  gradients of input, offset and mask; recomputes the columns
//   GEMM    grad_weight += grad_output^T * columns

#include "cpu/conv/deform_conv2d.h"

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "cpu/channels_last_copy.h"
#include "cpu/conv/deform_im2col.h"
#include "cpu/conv/grad_output_tile.h"
#include "cpu/conv/packed_weight.h"
#include "cpu/parallel.h"
#include "ops/backward_tiling.h"

namespace dcn::cpu {
namespace {

// Channels of a slice: at most kMaxSliceChannels, and kMinSliceChannels where
// there would be fewer than kSlices slices.
constexpr int64_t kMaxSliceChannels = 64;
constexpr int64_t kMinSliceChannels = 32;
constexpr int64_t kSlices = 8;
constexpr int64_t kMinCopiedChannels = 8;
// Budgets: channels-last copies of one slice of the input and its gradient,
// offset and mask gradients of one task, copies of grad_output, columns of one
// block, and all workspaces together.
constexpr int64_t kCopyBytes = int64_t{8} << 20;
constexpr int64_t kTapBytes = int64_t{2} << 20;
constexpr int64_t kGradOutputBytes = int64_t{24} << 20;
constexpr int64_t kColumnBytes = int64_t{512} << 10;
constexpr int64_t kWorkspaceBytes = int64_t{32} << 20;

int64_t round_down(int64_t value, int64_t multiple) {
  return value / multiple * multiple;
}

// How the backward pass is divided into tasks, whatever the number of threads.
struct BackwardTiling {
  ConvChannelTiling channels;
  int64_t tile; // output positions of one task
  int64_t tiles; // per image
  int64_t block; // output positions of one im2col tile
  int64_t workspace_bytes; // of a task
  int64_t images; // whose tasks run together

  BackwardTiling(
      const BackwardInputs& inputs,
      bool wants_input,
      bool accumulates_in_dtype,
      int64_t element_bytes,
      const GradOutputBytes& grad_output)
      : channels(
            inputs,
            wants_input,
            accumulates_in_dtype,
            accumulates_in_dtype,
            {std::clamp(
                 inputs.shape.in_channels / kSlices,
                 kMinSliceChannels,
                 kMaxSliceChannels),
             kMinCopiedChannels,
             kCopyBytes,
             element_bytes,
             element_bytes}) {
    const auto& shape = inputs.shape;
    const int64_t taps = shape.geometry.taps();
    const int64_t positions = shape.geometry.positions();
    const int64_t tap_bytes = 3 * taps * element_bytes;
    const int64_t depth = taps * channels.slice_channels;
    const int64_t max_tile = std::max<int64_t>(
        round_down(
            std::min(
                kTapBytes / tap_bytes,
                kGradOutputBytes / std::max<int64_t>(grad_output.position, 1)),
            4),
        4);
    block = std::min(
        std::clamp<int64_t>(
            round_down(kColumnBytes / (depth * element_bytes), 16), 16, 512),
        max_tile);
    tile = std::min(max_tile, positions);
    tiles = (positions + tile - 1) / tile;
    const int64_t image_bytes = padded_size(tile) * grad_output.position +
        block * grad_output.partial_block;
    images = std::clamp<int64_t>(
        kGradOutputBytes / std::max<int64_t>(image_bytes, 1),
        1,
        std::max<int64_t>(shape.batch, 1));
    workspace_bytes = channels.copy_bytes + tile * tap_bytes +
        element_bytes * (2 * block * depth + shape.group_out() * depth) +
        2 * block * taps * SamplingPlan<double>::kTapBytes;
  }

  int64_t slices() const {
    return static_cast<int64_t>(channels.slices.size());
  }
};

template <typename S, typename T, typename C>
class Backward {
 public:
  Backward(
      const BackwardInputs& inputs,
      const at::Tensor& weight,
      const DeformConvGradients& gradients)
      : inputs_(inputs),
        shape_(inputs.shape),
        gradients_(gradients),
        offset_gradients_(conv_offset_gradients(gradients)),
        wants_input_(gradients.input.numel() > 0),
        wants_offset_(offset_gradients_.any_defined()),
        wants_weight_(gradients.weight.numel() > 0),
        grad_output_(
            inputs_.grad_output,
            shape_,
            wants_input_ || wants_offset_,
            wants_weight_),
        tiling_(
            inputs,
            wants_input_,
            std::is_same_v<S, T>,
            sizeof(T),
            grad_output_.bytes()),
        offsets_(conv_offsets(inputs.shape, inputs.offset, inputs.mask)) {
    if (wants_input_ || wants_offset_) {
      weight_ =
          pack_backward_weight<S, C>(weight, shape_, tiling_.channels.slices);
    }
    if (wants_weight_) {
      const auto options =
          weight.options().dtype(c10::CppTypeToScalarType<T>::value);
      grad_weight_ = sums_weight() ? at::zeros({weight.numel()}, options)
                                   : at::empty({weight.numel()}, options);
    }
  }

  void run() {
    if (wants_input_ && !tiling_.channels.copies_grad) {
      gradients_.input.zero_();
    }
    if (wants_input_ || wants_offset_ || wants_weight_) {
      const int64_t count = std::min<int64_t>(
          {tiling_.images * tiling_.slices(),
           at::get_num_threads(),
           std::max<int64_t>(1, kWorkspaceBytes / tiling_.workspace_bytes)});
      std::vector<Workspace> workspaces;
      for (int64_t i = 0; i < count; ++i) {
        workspaces.push_back(make_workspace());
      }
      // One tile at a time: the tiles of an image add to the same pixels.
      for (int64_t tile = 0; tile < tiling_.tiles; ++tile) {
        for (int64_t first = 0; first < shape_.batch; first += tiling_.images) {
          const int64_t images = std::min(tiling_.images, shape_.batch - first);
          run_images(tile, first, images, workspaces);
        }
      }
    }
    if (wants_weight_) {
      unpack_weight_gradient<T, S>(
          grad_weight_.template data_ptr<T>(),
          shape_,
          tiling_.channels.slices,
          gradients_.weight);
    }
  }

 private:
  struct Task {
    int64_t image;
    int64_t tile;
    int64_t slice;
    int64_t begin; // output positions
    int64_t end;
  };

  // Buffers and results of one task.
  struct Workspace {
    std::unique_ptr<T[]> input; // channels-last copy of the slice
    std::unique_ptr<T[]> grad_input; // likewise
    std::unique_ptr<T[]> columns; // (block, taps, slice)
    std::unique_ptr<C[]> vnni_columns; // the same, if C has the VNNI layout
    std::unique_ptr<T[]> grad_weight; // (group_out, taps, slice) if summed
    std::unique_ptr<T[]> grad_taps; // (taps, 3, positions): dy, dx, mask
    std::unique_ptr<SamplingPlan<T>> plan; // of a block
    // For grad_input, if its strides differ from those of the input.
    std::unique_ptr<SamplingPlan<T>> grad_plan;
  };

  const ChannelSlice& slice(const Task& task) const {
    return tiling_.channels.slices[task.slice];
  }
  int64_t depth(const ChannelSlice& slice) const {
    return shape_.geometry.taps() * slice.size;
  }

  // Whether not exactly one task contributes to the weight gradient of a slice.
  bool sums_weight() const {
    return shape_.batch * tiling_.tiles != 1;
  }

  // The weight gradient of a slice, (group_out, taps * size).
  T* grad_weight_of(int64_t slice) const {
    return grad_weight_.template data_ptr<T>() +
        tiling_.channels.slices[slice].begin * shape_.group_out() *
        shape_.geometry.taps();
  }

  Workspace make_workspace() const {
    const auto& g = shape_.geometry;
    const int64_t channels = tiling_.channels.slice_channels;
    const int64_t copy = int64_t{g.in_h} * g.in_w * channels;
    const int64_t columns = tiling_.block * g.taps() * channels;
    const auto buffer = [](bool needed, int64_t size) {
      // Not value-initialised: every element is written before it is read.
      return std::unique_ptr<T[]>(needed ? new T[size] : nullptr);
    };
    Workspace workspace;
    workspace.input = buffer(tiling_.channels.copies_input, copy);
    workspace.grad_input = buffer(tiling_.channels.copies_grad, copy);
    workspace.columns = buffer(true, columns);
    workspace.vnni_columns.reset(
        OperandLayout<C>::kVnni && wants_weight_ ? new C[columns] : nullptr);
    workspace.plan = std::make_unique<SamplingPlan<T>>(offsets_, tiling_.block);
    workspace.grad_weight = buffer(
        wants_weight_ && sums_weight(),
        shape_.group_out() * g.taps() * channels);
    workspace.grad_taps = buffer(wants_offset_, tiling_.tile * g.taps() * 3);
    return workspace;
  }

  void run_images(
      int64_t tile,
      int64_t first_image,
      int64_t images,
      std::vector<Workspace>& workspaces) {
    const int64_t begin = tile * tiling_.tile;
    const int64_t end =
        std::min(begin + tiling_.tile, shape_.geometry.positions());
    grad_output_.load(first_image, images, begin, end, tiling_.block);
    const int64_t tasks = images * tiling_.slices();
    const auto task = [&](int64_t index) {
      const int64_t image = first_image + index / tiling_.slices();
      return Task{image, tile, index % tiling_.slices(), begin, end};
    };
    // As many tasks at a time as there are workspaces.
    const int64_t max_count = static_cast<int64_t>(workspaces.size());
    for (int64_t first = 0; first < tasks; first += max_count) {
      const int64_t count = std::min(max_count, tasks - first);
      parallel_tasks(count, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          run_task(task(first + i), workspaces[i]);
        }
        release_gemm<C>();
      });
      if (wants_weight_ && sums_weight()) {
        add_grad_weight(task(first), count, workspaces);
      }
      if (wants_offset_) {
        add_grad_taps(task(first), count, workspaces);
      }
    }
  }

  void run_task(const Task& task, Workspace& workspace) const {
    const auto& g = shape_.geometry;
    const auto& channels = slice(task);
    if (tiling_.channels.copies_grad) {
      std::fill_n(
          workspace.grad_input.get(),
          int64_t{g.in_h} * g.in_w * channels.size,
          T(0));
    }
    const auto map =
        feature_map_view<const S>(inputs_.input, task.image, channels.begin);
    if (tiling_.channels.copies_input) {
      const auto copy =
          channels_last_view(workspace.input.get(), g.in_w, channels.size);
      copy_rows(map, copy, 0, g.in_h, g.in_w, channels.size);
      run_blocks<T>(
          task,
          channels_last_view<const T>(
              workspace.input.get(), g.in_w, channels.size),
          workspace);
    } else {
      run_blocks<S>(task, map, workspace);
    }
    if (tiling_.channels.copies_grad) {
      const auto from = channels_last_view<const T>(
          workspace.grad_input.get(), g.in_w, channels.size);
      const auto to =
          feature_map_view<S>(gradients_.input, task.image, channels.begin);
      if (task.tile == 0) {
        copy_rows(from, to, 0, g.in_h, g.in_w, channels.size);
      } else {
        copy_rows<const T, S, true>(from, to, 0, g.in_h, g.in_w, channels.size);
      }
    }
  }

  // `map` is the slice of the input, in dtype M.
  template <typename M>
  void run_blocks(
      const Task& task,
      const FeatureMapView<const M>& map,
      Workspace& workspace) const {
    const auto& g = shape_.geometry;
    const auto& channels = slice(task);
    const int64_t taps = g.taps();
    Im2colGradients<T> wanted{
        {nullptr, 0, 0, 0}, workspace.plan.get(), wants_offset_, wants_weight_};
    if (tiling_.channels.copies_grad) {
      wanted.input =
          channels_last_view(workspace.grad_input.get(), g.in_w, channels.size);
    } else if (wants_input_) {
      // With another accumulator dtype there would be a copy.
      if constexpr (std::is_same_v<S, T>) {
        wanted.input =
            feature_map_view<T>(gradients_.input, task.image, channels.begin);
      }
    }
    const bool same_strides = wanted.input.data == nullptr ||
        (map.row_stride == wanted.input.row_stride &&
         map.column_stride == wanted.input.column_stride);
    if (!same_strides) {
      if (!workspace.grad_plan) {
        workspace.grad_plan =
            std::make_unique<SamplingPlan<T>>(offsets_, tiling_.block);
      }
      wanted.plan = workspace.grad_plan.get();
    }
    for (int64_t from = task.begin; from < task.end; from += tiling_.block) {
      const int64_t to = std::min(from + tiling_.block, task.end);
      const Im2colTile<T> columns{
          workspace.columns.get(),
          to - from,
          taps,
          channels.size,
          depth(channels)};
      workspace.plan->select(task.image, from, to);
      workspace.plan->compute(
          channels.offset_group, map.row_stride, map.column_stride);
      if (!same_strides) {
        workspace.grad_plan->select(task.image, from, to);
        workspace.grad_plan->compute(
            channels.offset_group,
            wanted.input.row_stride,
            wanted.input.column_stride);
      }
      if (wants_input_ || wants_offset_) {
        const auto grad_output =
            grad_output_.position_major(task.image, channels.group, from, to);
        gemm(
            grad_output,
            Matrix<const C>{
                weight_[task.slice].template data_ptr<C>(),
                grad_output.columns,
                depth(channels),
                depth(channels)},
            Matrix<T>{
                columns.data,
                grad_output.rows,
                depth(channels),
                columns.stride},
            Store::kOverwrite);
      }
      deform_im2col_backward<M, T>(map, *workspace.plan, columns, wanted);
      if (wants_offset_) {
        workspace.plan->compute_gradients(
            workspace.grad_taps.get() + from - task.begin,
            task.end - task.begin);
      }
      if (wants_weight_) {
        accumulate_grad_weight(task, from, to, workspace);
      }
    }
  }

  // Adds the contribution of positions [from, to) to the task's grad_weight.
  void accumulate_grad_weight(
      const Task& task,
      int64_t from,
      int64_t to,
      Workspace& workspace) const {
    const auto& channels = slice(task);
    const int64_t width = depth(channels);
    const auto grad_output =
        grad_output_.channel_major(task.image, channels.group, from, to);
    // Padding of the K dimension.
    std::fill_n(
        workspace.columns.get() + (to - from) * width,
        (grad_output.columns - (to - from)) * width,
        T(0));
    Matrix<const C> columns{nullptr, grad_output.columns, width, width};
    if constexpr (OperandLayout<C>::kVnni) {
      pack_vnni(
          workspace.columns.get(),
          grad_output.columns,
          width,
          workspace.vnni_columns.get());
      columns.data = workspace.vnni_columns.get();
    } else {
      columns.data = workspace.columns.get();
    }
    gemm(
        grad_output,
        columns,
        Matrix<T>{
            sums_weight() ? workspace.grad_weight.get()
                          : grad_weight_of(task.slice),
            shape_.group_out(),
            width,
            width},
        from == task.begin ? Store::kOverwrite : Store::kAdd);
  }

  // The following add the contributions of `count` tasks in their order.

  void add_grad_weight(
      const Task& first,
      int64_t count,
      const std::vector<Workspace>& workspaces) {
    const int64_t row =
        tiling_.channels.slice_channels * shape_.geometry.taps();
    parallel_items(
        shape_.group_out(), row * count, [&](int64_t begin, int64_t end) {
          for (int64_t i = 0; i < count; ++i) {
            const int64_t index = (first.slice + i) % tiling_.slices();
            const int64_t width = depth(tiling_.channels.slices[index]);
            T* sum = grad_weight_of(index);
            const T* part = workspaces[i].grad_weight.get();
            for (int64_t k = begin * width; k < end * width; ++k) {
              sum[k] += part[k];
            }
          }
        });
  }

  // The slices of an offset group are consecutive tasks: one buffer serves for
  // all groups.
  void add_grad_taps(
      const Task& first,
      int64_t count,
      const std::vector<Workspace>& workspaces) {
    const int64_t row = 3 * (first.end - first.begin);
    const int64_t taps = shape_.geometry.taps();
    grad_taps_.resize(taps * row);
    parallel_items(taps, row * count, [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t index = first.slice + i;
        const int64_t image = first.image + index / tiling_.slices();
        const int64_t slice = index % tiling_.slices();
        const T* part = workspaces[i].grad_taps.get();
        T* const sum = grad_taps_.data();
        if (!same_offset_group(slice, slice - 1)) {
          std::copy(part + begin * row, part + end * row, sum + begin * row);
        } else {
          for (int64_t k = begin * row; k < end * row; ++k) {
            sum[k] += part[k];
          }
        }
        if (!same_offset_group(slice, slice + 1)) {
          for (int64_t tap = begin; tap < end; ++tap) {
            store_grad_tap(
                {image, first.tile, slice, first.begin, first.end}, tap);
          }
        }
      }
    });
  }

  bool same_offset_group(int64_t slice, int64_t other) const {
    const auto& slices = tiling_.channels.slices;
    return other >= 0 && other < tiling_.slices() &&
        slices[other].offset_group == slices[slice].offset_group;
  }

  void store_grad_tap(const Task& task, int64_t tap) const {
    const auto& g = shape_.geometry;
    const int64_t positions = task.end - task.begin;
    const int64_t channel = slice(task).offset_group * g.taps() + tap;
    const T* sums = grad_taps_.data() + 3 * tap * positions;
    const auto store = [&](const AnyDtypeView& view, int64_t c, const T* row) {
      if (view.defined()) {
        view.store_positions(task.image, c, task.begin, task.end, g.out_w, row);
      }
    };
    store(offset_gradients_.offset, 2 * channel, sums);
    store(offset_gradients_.offset, 2 * channel + 1, sums + positions);
    store(offset_gradients_.mask, channel, sums + 2 * positions);
  }

  BackwardInputs inputs_;
  const DeformConvShape& shape_;
  DeformConvGradients gradients_;
  ConvOffsetGradients offset_gradients_;
  bool wants_input_;
  bool wants_offset_; // or the mask
  bool wants_weight_;
  GradOutputTile<S, C> grad_output_;
  BackwardTiling tiling_;
  ConvOffsets offsets_;
  std::vector<at::Tensor> weight_; // packed, per slice
  at::Tensor grad_weight_; // (group_out, taps * size) for each slice
  std::vector<T> grad_taps_; // of the current tile and offset group
};

} // namespace

template <typename S, typename T, typename C>
void deform_conv2d_backward(
    const BackwardInputs& inputs,
    const at::Tensor& weight,
    const DeformConvGradients& gradients) {
  Backward<S, T, C>(inputs, weight, gradients).run();
}

#define DCN_INSTANTIATE_BACKWARD(S, T, C)        \
  template void deform_conv2d_backward<S, T, C>( \
      const BackwardInputs&, const at::Tensor&, const DeformConvGradients&);

DCN_INSTANTIATE_BACKWARD(double, double, double)
DCN_INSTANTIATE_BACKWARD(float, float, float)
DCN_INSTANTIATE_BACKWARD(c10::Half, float, float)
DCN_INSTANTIATE_BACKWARD(c10::BFloat16, float, float)
DCN_INSTANTIATE_BACKWARD(c10::BFloat16, float, c10::BFloat16)
#undef DCN_INSTANTIATE_BACKWARD

} // namespace dcn::cpu
