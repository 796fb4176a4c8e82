// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Backward pass. Its tasks are (image, tile of output positions, slice of input
// channels). A task writes its part of grad_input directly. Its contributions
// to the gradients of weight, offset and mask go to its workspace and are
// reduced in task order. So there are no locks and no atomics, and the results
// have the same bits for any number of threads. Where these are more than the
// tasks, several share a task.
// What a task computes is in block_gradients.h.

#include "cpu/conv/deform_conv2d.h"

#include <algorithm>
#include <utility>
#include <vector>

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "cpu/conv/backward_tiling.h"
#include "cpu/conv/block_gradients.h"
#include "cpu/conv/grad_output_tile.h"
#include "cpu/conv/packed_weight.h"
#include "cpu/parallel.h"

namespace dcn::cpu {
namespace {

template <typename S, typename T, typename C>
class Backward {
 public:
  Backward(
      const BackwardInputs& inputs,
      const at::Tensor& weight,
      const DeformConvGradients& gradients)
      : shape_(inputs.shape),
        gradients_(gradients),
        offset_gradients_(conv_offset_gradients(gradients)),
        wanted_{
            gradients.input.numel() > 0,
            offset_gradients_.any_defined(),
            gradients.weight.numel() > 0},
        grad_output_(
            inputs.grad_output,
            shape_,
            wanted_.columns(),
            wanted_.weight),
        tiling_(
            inputs,
            wanted_.input,
            std::is_same_v<S, T>,
            sizeof(T),
            grad_output_.bytes()),
        blocks_(
            inputs,
            weight,
            gradients.input,
            wanted_,
            tiling_,
            grad_output_) {
    if (wanted_.weight) {
      const auto options =
          weight.options().dtype(c10::CppTypeToScalarType<T>::value);
      grad_weight_ = tiling_.sums_weight ? at::zeros({weight.numel()}, options)
                                         : at::empty({weight.numel()}, options);
    }
  }

  void run() {
    if (wanted_.input && !tiling_.channels.copies_grad) {
      gradients_.input.zero_();
    }
    if (wanted_.any()) {
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
        workspaces.push_back(blocks_.make_workspace(threads_per_task_));
      }
      // One tile at a time: the tiles of an image add to the same pixels.
      for (int64_t tile = 0; tile < tiling_.tiles; ++tile) {
        for (int64_t first = 0; first < shape_.batch; first += tiling_.images) {
          const int64_t images = std::min(tiling_.images, shape_.batch - first);
          run_images(tile, first, images, workspaces);
        }
      }
    }
    if (wanted_.weight) {
      unpack_weight_gradient<T, S>(
          grad_weight_.template data_ptr<T>(),
          shape_,
          tiling_.channels.slices,
          gradients_.weight);
    }
  }

 private:
  using Task = typename BlockGradients<S, T, C>::Task;
  using Block = typename BlockGradients<S, T, C>::Block;
  using Workspace = typename BlockGradients<S, T, C>::Workspace;

  // The weight gradient of a slice, (group_out, taps * size).
  T* grad_weight_of(int64_t slice) const {
    return grad_weight_.template data_ptr<T>() +
        tiling_.channels.slices[slice].begin * shape_.group_out() *
        shape_.geometry.taps();
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
      if (wanted_.weight && tiling_.sums_weight) {
        add_grad_weight(round, workspaces);
      }
      if (wanted_.offset) {
        add_grad_taps(round, workspaces);
      }
    }
  }

  // A task on one thread.
  void run_task(const Task& task, Workspace& workspace) const {
    const int64_t rows = shape_.geometry.in_h;
    blocks_.load_rows(task, workspace, 0, rows);
    Block& block = workspace.blocks.front();
    for (int64_t from = task.begin; from < task.end; from += tiling_.block) {
      block.begin = from;
      block.end = std::min(from + tiling_.block, task.end);
      blocks_.run_block(task, workspace, block);
      if (wanted_.weight) {
        blocks_.add_grad_weight(
            task,
            block,
            0,
            shape_.group_out(),
            grad_weight_of(task, workspace));
      }
    }
    blocks_.store_rows(task, workspace, 0, rows);
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
      blocks_.load_rows(task, workspace, begin, end);
    };
    const auto store = [&](const Task& task, Workspace& workspace, int64_t i) {
      const auto [begin, end] = part(shape_.geometry.in_h, 1, i);
      blocks_.store_rows(task, workspace, begin, end);
    };
    const int64_t step = threads_per_task_ * tiling_.block;
    share(load);
    for (int64_t from = tasks[0].begin; from < tasks[0].end; from += step) {
      share([&](const Task& task, Workspace& workspace, int64_t i) {
        Block& block = workspace.blocks[i];
        block.begin = std::min(from + i * tiling_.block, task.end);
        block.end = std::min(block.begin + tiling_.block, task.end);
        if (block.begin < block.end) {
          blocks_.run_block(task, workspace, block);
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
    const auto [begin, end] =
        part(tiling_.channels.slices[task.slice].size, 4, i);
    blocks_.add_grad_input(task, workspace, block, begin, end);
    if (wanted_.weight) {
      const int64_t outputs = shape_.group_out();
      const auto [begin, end] =
          part(outputs, has_independent_rows<C>() ? 16 : outputs, i);
      blocks_.add_grad_weight(
          task, block, begin, end, grad_weight_of(task, workspace));
    }
  }

  // Where a task accumulates the weight gradient of its slice.
  T* grad_weight_of(const Task& task, const Workspace& workspace) const {
    return tiling_.sums_weight ? workspace.grad_weight.get()
                               : grad_weight_of(task.slice);
  }

  // The following add the contributions of tasks in their order.

  void add_grad_weight(
      const std::vector<Task>& tasks,
      const std::vector<Workspace>& workspaces) {
    const int64_t size = tiling_.channels.slice_channels *
        shape_.geometry.taps() * static_cast<int64_t>(tasks.size());
    parallel_items(shape_.group_out(), size, [&](int64_t begin, int64_t end) {
      for (size_t i = 0; i < tasks.size(); ++i) {
        const int64_t width = blocks_.depth(tasks[i].slice);
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
    const int64_t first =
        tiling_.channels.slices[task.slice].offset_group * g.taps();
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

  const DeformConvShape& shape_;
  DeformConvGradients gradients_;
  ConvOffsetGradients offset_gradients_;
  WantedGradients wanted_;
  GradOutputTile<S, C> grad_output_;
  BackwardTiling tiling_;
  BlockGradients<S, T, C> blocks_;
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
