// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Backward pass. Its tasks are (image, tile of output positions, slice of input
// channels). A task writes its part of grad_input directly. Its contributions
// to the gradients of weight, offset and mask go to its workspace and are
// reduced in task order. So there are no locks and no atomics, and the results
// have the same bits for any number of threads. Where these are more than the
// tasks, several share a task.
//
// A task, block by block of output positions:
//   GEMM    grad_columns = grad_output * weight
//   col2im  gradients of input, offset and mask; recomputes the columns
//   GEMM    grad_weight += grad_output^T * columns

#include "cpu/conv/deform_conv2d.h"

#include <algorithm>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "cpu/buffer.h"
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
// Narrower slices of channels-last maps are copied: in place, threads would
// write to the same cache lines.
constexpr int64_t kMinInPlaceChannels = 16;
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
  int64_t workspace_bytes; // of a task on one thread
  int64_t block_bytes; // of a block, where threads share a task
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
             element_bytes,
             kMinInPlaceChannels}) {
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
    block_bytes = 3 * element_bytes * block * depth +
        2 * block * taps * SamplingPlan<double>::kTapBytes;
    workspace_bytes = channels.copy_bytes + tile * tap_bytes +
        element_bytes * shape.group_out() * depth + block_bytes;
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
      const int64_t threads = at::get_num_threads();
      const int64_t count = std::min<int64_t>(
          {tiling_.images * tiling_.slices(),
           threads,
           std::max<int64_t>(1, kWorkspaceBytes / tiling_.workspace_bytes)});
      threads_per_task_ = std::clamp<int64_t>(
          threads / count,
          1,
          std::max<int64_t>(
              1, kWorkspaceBytes / (count * tiling_.block_bytes)));
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
    Workspace workspace;
    workspace.input = buffer<T>(tiling_.channels.copies_input, copy);
    workspace.grad_input = buffer<T>(tiling_.channels.copies_grad, copy);
    workspace.grad_weight = buffer<T>(
        wants_weight_ && sums_weight(),
        shape_.group_out() * g.taps() * channels);
    workspace.grad_taps = buffer<T>(wants_offset_, tiling_.tile * g.taps() * 3);
    for (int64_t i = 0; i < threads_per_task_; ++i) {
      workspace.blocks.push_back(make_block());
    }
    return workspace;
  }

  Block make_block() const {
    const int64_t columns = tiling_.block * shape_.geometry.taps() *
        tiling_.channels.slice_channels;
    Block block;
    block.columns = buffer<T>(true, columns);
    block.separate_columns =
        buffer<T>(threads_per_task_ > 1 && wants_weight_, columns);
    block.vnni_columns =
        buffer<C>(OperandLayout<C>::kVnni && wants_weight_, columns);
    block.plan = std::make_unique<SamplingPlan<T>>(offsets_, tiling_.block);
    return block;
  }

  template <typename E>
  static Buffer<E> buffer(bool needed, int64_t size) {
    return needed ? make_buffer<E>(size) : nullptr;
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
    // As many tasks at a time as there are workspaces.
    const int64_t max_count = static_cast<int64_t>(workspaces.size());
    for (int64_t first = 0; first < tasks; first += max_count) {
      const int64_t count = std::min(max_count, tasks - first);
      std::vector<Task> round;
      for (int64_t i = first; i < first + count; ++i) {
        const int64_t image = first_image + i / tiling_.slices();
        round.push_back({image, tile, i % tiling_.slices(), begin, end});
      }
      if (threads_per_task_ > 1) {
        run_shared(round, workspaces);
      } else {
        parallel_tasks(count, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            run_task(round[i], workspaces[i]);
          }
          release_gemm<C>();
        });
      }
      if (wants_weight_ && sums_weight()) {
        add_grad_weight(round, workspaces);
      }
      if (wants_offset_) {
        add_grad_taps(round, workspaces);
      }
    }
  }

  // A task on one thread.
  void run_task(const Task& task, Workspace& workspace) const {
    const int64_t rows = shape_.geometry.in_h;
    load_rows(task, workspace, 0, rows);
    Block& block = workspace.blocks.front();
    for (int64_t from = task.begin; from < task.end; from += tiling_.block) {
      block.begin = from;
      block.end = std::min(from + tiling_.block, task.end);
      run_block(task, workspace, block);
      if (wants_weight_) {
        accumulate_grad_weight(task, workspace, block, 0, shape_.group_out());
      }
    }
    store_rows(task, workspace, 0, rows);
  }

  // Tasks that are fewer than the threads: `threads_per_task_` threads share
  // each. They work on as many blocks at once, then add them in order, each
  // for its channels of grad_input and outputs of grad_weight. The same sums in
  // the same order as run_task.
  void run_shared(
      const std::vector<Task>& tasks,
      std::vector<Workspace>& workspaces) const {
    const auto share = [&](const auto& body) {
      const int64_t count = static_cast<int64_t>(tasks.size());
      parallel_tasks(
          count * threads_per_task_, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
              const int64_t task = i / threads_per_task_;
              body(tasks[task], workspaces[task], i % threads_per_task_);
            }
            release_gemm<C>();
          });
    };
    const auto load = [&](const Task& task, Workspace& workspace, int64_t i) {
      const auto [begin, end] = part(shape_.geometry.in_h, 1, i);
      load_rows(task, workspace, begin, end);
    };
    const auto store = [&](const Task& task, Workspace& workspace, int64_t i) {
      const auto [begin, end] = part(shape_.geometry.in_h, 1, i);
      store_rows(task, workspace, begin, end);
    };
    const int64_t step = threads_per_task_ * tiling_.block;
    share(load);
    for (int64_t from = tasks[0].begin; from < tasks[0].end; from += step) {
      share([&](const Task& task, Workspace& workspace, int64_t i) {
        Block& block = workspace.blocks[i];
        block.begin = std::min(from + i * tiling_.block, task.end);
        block.end = std::min(block.begin + tiling_.block, task.end);
        if (block.begin < block.end) {
          run_block(task, workspace, block);
        }
      });
      share([&](const Task& task, Workspace& workspace, int64_t i) {
        for (const Block& block : workspace.blocks) {
          if (block.begin < block.end) {
            add_block(task, workspace, block, i);
          }
        }
      });
    }
    share(store);
  }

  // The range [begin, end) of `size` items that thread i of a task works on, in
  // multiples of `multiple`.
  std::pair<int64_t, int64_t> part(int64_t size, int64_t multiple, int64_t i)
      const {
    const int64_t units = (size + multiple - 1) / multiple;
    const auto at = [&](int64_t k) {
      return std::min(units * k / threads_per_task_ * multiple, size);
    };
    return {at(i), at(i + 1)};
  }

  // What run_block leaves to the threads of a task.
  void add_block(
      const Task& task,
      const Workspace& workspace,
      const Block& block,
      int64_t i) const {
    const auto grad_input = grad_map(task, workspace);
    if (grad_input.data != nullptr) {
      const auto [begin, end] = part(slice(task).size, 4, i);
      if (begin < end) {
        deform_col2im(
            block.grad_plan ? *block.grad_plan : *block.plan,
            tile_of(task, block),
            begin,
            end,
            grad_input);
      }
    }
    if (wants_weight_) {
      const int64_t outputs = shape_.group_out();
      const auto [begin, end] =
          part(outputs, has_independent_rows<C>() ? 16 : outputs, i);
      accumulate_grad_weight(task, workspace, block, begin, end);
    }
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
        feature_map_view<S>(gradients_.input, task.image, channels.begin);
    if (task.tile == 0) {
      copy_rows(from, to, begin, end, g.in_w, channels.size);
    } else {
      copy_rows<const T, S, true>(from, to, begin, end, g.in_w, channels.size);
    }
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
      if (wants_input_) {
        return feature_map_view<T>(
            gradients_.input, task.image, channels.begin);
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
        depth(channels)};
  }

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

  // The gradients of a block: all but that of the weight, and that of the input
  // unless the threads of the task share it. `map` is the slice of the input,
  // in dtype M.
  template <typename M>
  void run_block(
      const Task& task,
      const FeatureMapView<const M>& map,
      Workspace& workspace,
      Block& block) const {
    const auto& channels = slice(task);
    const int64_t from = block.begin, to = block.end;
    const FeatureMapView<T> grad_input = grad_map(task, workspace);
    block.plan->select(task.image, from, to);
    const int64_t next = from + threads_per_task_ * tiling_.block;
    block.plan->compute(
        channels.offset_group,
        map.row_stride,
        map.column_stride,
        {channels.offset_group,
         std::min(next, task.end),
         std::min(next + tiling_.block, task.end)});
    const bool same_strides = grad_input.data == nullptr ||
        (map.row_stride == grad_input.row_stride &&
         map.column_stride == grad_input.column_stride);
    if (!same_strides) {
      if (!block.grad_plan) {
        block.grad_plan =
            std::make_unique<SamplingPlan<T>>(offsets_, tiling_.block);
      }
      block.grad_plan->select(task.image, from, to);
      block.grad_plan->compute(
          channels.offset_group,
          grad_input.row_stride,
          grad_input.column_stride,
          {channels.offset_group, to, to});
    }
    const Im2colTile<T> tile = tile_of(task, block);
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
          Matrix<T>{tile.data, grad_output.rows, depth(channels), tile.stride},
          Store::kOverwrite);
    }
    Im2colGradients<T> wanted{
        {nullptr, 0, 0, 0},
        block.grad_plan ? block.grad_plan.get() : block.plan.get(),
        wants_offset_,
        wants_weight_ ? columns_of(block) : nullptr};
    if (threads_per_task_ == 1) {
      wanted.input = grad_input;
    }
    deform_im2col_backward<M, T>(map, *block.plan, tile, wanted);
    if (wants_offset_) {
      block.plan->compute_gradients(
          workspace.grad_taps.get() + from - task.begin, task.end - task.begin);
    }
    if (wants_weight_) {
      finish_columns(task, block);
    }
  }

  static T* columns_of(const Block& block) {
    return block.separate_columns ? block.separate_columns.get()
                                  : block.columns.get();
  }

  // The columns as the GEMM reads them.
  void finish_columns(const Task& task, const Block& block) const {
    const int64_t width = depth(slice(task));
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

  // Adds the contribution of a block to the task's gradient of the weight, of
  // outputs [begin, end) of the group.
  void accumulate_grad_weight(
      const Task& task,
      const Workspace& workspace,
      const Block& block,
      int64_t begin,
      int64_t end) const {
    if (begin == end) {
      return;
    }
    const auto& channels = slice(task);
    const int64_t width = depth(channels);
    const auto grad_output = grad_output_.channel_major(
        task.image, channels.group, block.begin, block.end);
    Matrix<const C> columns{nullptr, grad_output.columns, width, width};
    if constexpr (OperandLayout<C>::kVnni) {
      columns.data = block.vnni_columns.get();
    } else {
      columns.data = columns_of(block);
    }
    T* const grad_weight = sums_weight() ? workspace.grad_weight.get()
                                         : grad_weight_of(task.slice);
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

  // The following add the contributions of tasks in their order.

  void add_grad_weight(
      const std::vector<Task>& tasks,
      const std::vector<Workspace>& workspaces) {
    const int64_t size = tiling_.channels.slice_channels *
        shape_.geometry.taps() * static_cast<int64_t>(tasks.size());
    parallel_items(shape_.group_out(), size, [&](int64_t begin, int64_t end) {
      for (size_t i = 0; i < tasks.size(); ++i) {
        const int64_t width = depth(slice(tasks[i]));
        T* sum = grad_weight_of(tasks[i].slice);
        const T* part = workspaces[i].grad_weight.get();
        for (int64_t k = begin * width; k < end * width; ++k) {
          sum[k] += part[k];
        }
      }
    });
  }

  // The slices of an offset group are consecutive tasks: one buffer serves for
  // all groups. Some positions at a time, since the channels of channels-last
  // gradients share cache lines.
  void add_grad_taps(
      const std::vector<Task>& tasks,
      const std::vector<Workspace>& workspaces) {
    constexpr int64_t kPositions = 128;
    const int64_t positions = tasks[0].end - tasks[0].begin;
    const int64_t rows = 3 * shape_.geometry.taps();
    const int64_t size = rows * kPositions * static_cast<int64_t>(tasks.size());
    grad_taps_.resize(rows * positions);
    const auto add = [&](int64_t begin, int64_t end) {
      for (size_t i = 0; i < tasks.size(); ++i) {
        const bool is_first =
            !same_offset_group(tasks[i].slice, tasks[i].slice - 1);
        for (int64_t row = 0; row < rows; ++row) {
          T* sum = grad_taps_.data() + row * positions;
          const T* part = workspaces[i].grad_taps.get() + row * positions;
          for (int64_t p = begin; p < end; ++p) {
            sum[p] = is_first ? part[p] : sum[p] + part[p];
          }
        }
        if (!same_offset_group(tasks[i].slice, tasks[i].slice + 1)) {
          store_grad_taps(tasks[i], begin, end);
        }
      }
    };
    const int64_t chunks = (positions + kPositions - 1) / kPositions;
    parallel_items(chunks, size, [&](int64_t chunk, int64_t last) {
      for (; chunk < last; ++chunk) {
        const int64_t begin = chunk * kPositions;
        add(begin, std::min(begin + kPositions, positions));
      }
    });
  }

  bool same_offset_group(int64_t slice, int64_t other) const {
    const auto& slices = tiling_.channels.slices;
    return other >= 0 && other < tiling_.slices() &&
        slices[other].offset_group == slices[slice].offset_group;
  }

  // Positions [begin, end) of a task.
  void store_grad_taps(const Task& task, int64_t begin, int64_t end) const {
    const auto& g = shape_.geometry;
    const int64_t positions = task.end - task.begin;
    const int64_t first = slice(task).offset_group * g.taps();
    const auto store = [&](const AnyDtypeView& view, int64_t c, const T* row) {
      if (view.defined()) {
        view.store_positions(
            task.image,
            c,
            task.begin + begin,
            task.begin + end,
            g.out_w,
            row + begin);
      }
    };
    for (int64_t tap = 0; tap < g.taps(); ++tap) {
      const T* sums = grad_taps_.data() + 3 * tap * positions;
      const int64_t channel = first + tap;
      store(offset_gradients_.offset, 2 * channel, sums);
      store(offset_gradients_.offset, 2 * channel + 1, sums + positions);
      store(offset_gradients_.mask, channel, sums + 2 * positions);
    }
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
  int64_t threads_per_task_ = 1;
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
