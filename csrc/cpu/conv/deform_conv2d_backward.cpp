// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// The backward pass is cut into tasks (image, tile of output positions, slice
// of input channels). A task owns its run of grad_input; what it adds to the
// gradients of the weight and of the taps goes to buffers of its own, which are
// summed in task order after each wave of tasks. So there are no locks and no
// atomics, and the sums do not depend on the number of threads.

#include "cpu/conv/deform_conv2d_backward.h"

#include <algorithm>
#include <type_traits>

#include <ATen/ops/zeros.h>

#include "cpu/channels_last_copy.h"
#include "cpu/conv/packed_weight.h"
#include "cpu/conv/vnni_pack.h"
#include "cpu/parallel.h"

namespace dcn::cpu {
namespace {

// All slots together.
constexpr int64_t kWorkspaceBytes = int64_t{32} << 20;

} // namespace

template <typename S, typename T, typename C>
DeformConvBackward<S, T, C>::DeformConvBackward(
    const BackwardInputs& inputs,
    const at::Tensor& weight,
    const DeformConvGradients& gradients)
    : inputs_(inputs),
      shape_(inputs.shape),
      gradients_(gradients),
      tap_gradients_(conv_offset_gradients(gradients)),
      wants_input_(gradients.input.numel() > 0),
      wants_taps_(tap_gradients_.any_defined()),
      wants_weight_(gradients.weight.numel() > 0),
      grad_output_(
          inputs_.grad_output,
          shape_,
          wants_input_ || wants_taps_,
          wants_weight_),
      tiling_(
          inputs,
          wants_input_,
          std::is_same_v<S, T>,
          sizeof(T),
          grad_output_.position_bytes()),
      taps_(conv_offsets(inputs.shape, inputs.offset, inputs.mask)) {
  if (wants_input_ || wants_taps_) {
    weight_ =
        pack_backward_weight<S, C>(weight, shape_, tiling_.channels.slices);
  }
  for (const auto& slice : tiling_.channels.slices) {
    if (wants_weight_) {
      grad_weight_.push_back(
          at::zeros(
              {shape_.group_out(), depth(slice)},
              weight.options().dtype(c10::CppTypeToScalarType<T>::value)));
    }
  }
}

template <typename S, typename T, typename C>
void DeformConvBackward<S, T, C>::run() {
  if (wants_input_ && !tiling_.channels.copies_grad) {
    gradients_.input.zero_();
  }
  if (wants_input_ || wants_taps_ || wants_weight_) {
    const int64_t count = std::min<int64_t>(
        {tiling_.images * tiling_.slices(),
         at::get_num_threads(),
         std::max<int64_t>(1, kWorkspaceBytes / tiling_.workspace_bytes)});
    std::vector<Workspace> workspaces;
    for (int64_t i = 0; i < count; ++i) {
      workspaces.push_back(make_workspace());
    }
    // Tasks of one image and slice add to the same pixels, tile after tile.
    for (int64_t tile = 0; tile < tiling_.tiles; ++tile) {
      for (int64_t first = 0; first < shape_.batch; first += tiling_.images) {
        const int64_t images = std::min(tiling_.images, shape_.batch - first);
        run_images(tile, first, images, workspaces);
      }
    }
  }
  if (wants_weight_) {
    store_grad_weight();
  }
}

template <typename S, typename T, typename C>
void DeformConvBackward<S, T, C>::run_images(
    int64_t tile,
    int64_t first_image,
    int64_t images,
    std::vector<Workspace>& workspaces) {
  const int64_t begin = tile * tiling_.tile;
  const int64_t end =
      std::min(begin + tiling_.tile, shape_.geometry.positions());
  grad_output_.load(first_image, images, begin, end);
  const int64_t tasks = images * tiling_.slices();
  const auto task = [&](int64_t index) {
    const int64_t image = first_image + index / tiling_.slices();
    return Task{image, tile, index % tiling_.slices(), begin, end};
  };
  const int64_t count = static_cast<int64_t>(workspaces.size());
  for (int64_t first = 0; first < tasks; first += count) {
    const int64_t wave = std::min(count, tasks - first);
    parallel_tasks(wave, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        run_task(task(first + i), workspaces[i]);
      }
      release_gemm<C>();
    });
    for (int64_t i = 0; i < wave; ++i) {
      if (wants_weight_) {
        add_grad_weight(task(first + i), workspaces[i]);
      }
      if (wants_taps_) {
        add_grad_taps(task(first + i), workspaces[i]);
      }
    }
  }
}

template <typename S, typename T, typename C>
TaskWorkspace<T, C> DeformConvBackward<S, T, C>::make_workspace() const {
  const auto& g = shape_.geometry;
  const int64_t widest = tiling_.channels.widest;
  const int64_t copy = int64_t{g.in_h} * g.in_w * widest;
  const int64_t columns = tiling_.block * g.taps() * widest;
  const auto buffer = [](bool needed, int64_t size) {
    // Not value-initialised: every element is written before it is read.
    return std::unique_ptr<T[]>(needed ? new T[size] : nullptr);
  };
  Workspace workspace;
  workspace.input = buffer(tiling_.channels.copies_input, copy);
  workspace.grad_input = buffer(tiling_.channels.copies_grad, copy);
  workspace.columns = buffer(true, columns);
  workspace.pairs.reset(
      OperandLayout<C>::kVnni && wants_weight_ ? new C[columns] : nullptr);
  workspace.taps.reset(new DeformTap<T>[tiling_.block * g.taps()]);
  workspace.grad_weight =
      buffer(wants_weight_, shape_.group_out() * g.taps() * widest);
  workspace.grad_taps = buffer(wants_taps_, tiling_.tile * g.taps() * 3);
  return workspace;
}

template <typename S, typename T, typename C>
void DeformConvBackward<S, T, C>::run_task(
    const Task& task,
    Workspace& workspace) const {
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

template <typename S, typename T, typename C>
template <typename M>
void DeformConvBackward<S, T, C>::run_blocks(
    const Task& task,
    const FeatureMapView<const M>& map,
    Workspace& workspace) const {
  const auto& g = shape_.geometry;
  const auto& channels = slice(task);
  const int64_t taps = g.taps();
  Im2colGradients<T> wanted{{nullptr, 0, 0, 0}, nullptr, wants_weight_};
  if (tiling_.channels.copies_grad) {
    wanted.input =
        channels_last_view(workspace.grad_input.get(), g.in_w, channels.size);
  } else if (wants_input_) {
    // The same dtype, or a copy would be made.
    if constexpr (std::is_same_v<S, T>) {
      wanted.input =
          feature_map_view<T>(gradients_.input, task.image, channels.begin);
    }
  }
  for (int64_t from = task.begin; from < task.end; from += tiling_.block) {
    const int64_t to = std::min(from + tiling_.block, task.end);
    const Im2colTile<T> columns{
        workspace.columns.get(),
        to - from,
        taps,
        channels.size,
        depth(channels)};
    compute_taps(
        taps_,
        task.image,
        channels.offset_group,
        from,
        to,
        workspace.taps.get());
    if (wants_input_ || wants_taps_) {
      const auto rows = grad_output_.rows(task.image, channels.group, from, to);
      gemm(
          rows,
          Matrix<const C>{
              weight_[task.slice].template data_ptr<C>(),
              rows.columns,
              depth(channels),
              depth(channels)},
          Matrix<T>{columns.data, to - from, depth(channels), columns.stride},
          Store::kOverwrite);
      if (wants_taps_) {
        wanted.taps =
            workspace.grad_taps.get() + (from - task.begin) * taps * 3;
      }
      deform_im2col_backward<M, T>(map, workspace.taps.get(), columns, wanted);
    } else {
      deform_im2col<M, T, T>(map, workspace.taps.get(), taps, columns);
    }
    if (wants_weight_) {
      accumulate_grad_weight(task, from, to, workspace);
    }
  }
}

// The task's part of the gradient of the weight, from the columns of a block.
template <typename S, typename T, typename C>
void DeformConvBackward<S, T, C>::accumulate_grad_weight(
    const Task& task,
    int64_t from,
    int64_t to,
    Workspace& workspace) const {
  const auto& channels = slice(task);
  const int64_t width = depth(channels);
  const auto planes = grad_output_.planes(task.image, channels.group, from, to);
  Matrix<const C> columns{nullptr, planes.columns, width, width};
  if constexpr (OperandLayout<C>::kVnni) {
    pack_vnni(workspace.columns.get(), to - from, width, workspace.pairs.get());
    columns.data = workspace.pairs.get();
  } else {
    columns.data = workspace.columns.get();
  }
  gemm(
      planes,
      columns,
      Matrix<T>{workspace.grad_weight.get(), shape_.group_out(), width, width},
      from == task.begin ? Store::kOverwrite : Store::kAdd);
}

template <typename S, typename T, typename C>
void DeformConvBackward<S, T, C>::add_grad_weight(
    const Task& task,
    const Workspace& workspace) {
  T* sum = grad_weight_[task.slice].template data_ptr<T>();
  const T* part = workspace.grad_weight.get();
  const int64_t size = shape_.group_out() * depth(slice(task));
  at::parallel_for(0, size, 1 << 15, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      sum[i] += part[i];
    }
  });
}

// Slices of an offset group follow each other, so one sum is open at a time.
template <typename S, typename T, typename C>
void DeformConvBackward<S, T, C>::add_grad_taps(
    const Task& task,
    const Workspace& workspace) {
  const int64_t size = (task.end - task.begin) * shape_.geometry.taps() * 3;
  const int64_t slices = tiling_.slices();
  const int64_t group = slice(task).offset_group;
  const auto other_group = [&](int64_t index) {
    return index < 0 || index == slices ||
        tiling_.channels.slices[index].offset_group != group;
  };
  const T* part = workspace.grad_taps.get();
  if (other_group(task.slice - 1)) {
    grad_taps_.assign(part, part + size);
  } else {
    for (int64_t i = 0; i < size; ++i) {
      grad_taps_[i] += part[i];
    }
  }
  if (other_group(task.slice + 1)) {
    store_grad_taps(task);
  }
}

template <typename S, typename T, typename C>
void DeformConvBackward<S, T, C>::store_grad_taps(const Task& task) const {
  const auto& g = shape_.geometry;
  const T* sums = grad_taps_.data();
  for (int64_t p = task.begin; p < task.end; ++p) {
    for (int tap = 0; tap < g.taps(); ++tap, sums += 3) {
      tap_gradients_.store(
          g, task.image, slice(task).offset_group, p, tap, sums, false);
    }
  }
}

template <typename S, typename T, typename C>
void DeformConvBackward<S, T, C>::store_grad_weight() const {
  const auto& g = shape_.geometry;
  for (size_t i = 0; i < tiling_.channels.slices.size(); ++i) {
    const auto& slice = tiling_.channels.slices[i];
    gradients_.weight
        .narrow(0, slice.group * shape_.group_out(), shape_.group_out())
        .narrow(1, slice.begin - slice.group * shape_.group_in(), slice.size)
        .copy_(
            grad_weight_[i]
                .view({shape_.group_out(), g.kernel_h, g.kernel_w, slice.size})
                .permute({0, 3, 1, 2}));
  }
}

template class DeformConvBackward<double, double, double>;
template class DeformConvBackward<float, float, float>;
template class DeformConvBackward<c10::Half, float, float>;
template class DeformConvBackward<c10::BFloat16, float, float>;
template class DeformConvBackward<c10::BFloat16, float, c10::BFloat16>;

} // namespace dcn::cpu
