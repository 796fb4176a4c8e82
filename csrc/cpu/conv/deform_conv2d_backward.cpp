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

namespace dcn {
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
      tap_gradients_(tap_gradients(gradients)),
      wants_input_(gradients.input.numel() > 0),
      wants_taps_(tap_gradients_.wanted()),
      wants_weight_(gradients.weight.numel() > 0),
      grad_output_(
          inputs_.grad_output,
          shape_,
          wants_input_ || wants_taps_,
          wants_weight_),
      plan_(
          inputs,
          wants_input_,
          std::is_same_v<S, T>,
          sizeof(T),
          grad_output_.position_bytes()),
      taps_(tap_source(inputs.shape, inputs.offset, inputs.mask)) {
  if (wants_input_ || wants_taps_) {
    weight_ = pack_slices<S, C>(weight, shape_, plan_.cut.slices);
  }
  for (const auto& slice : plan_.cut.slices) {
    if (wants_weight_) {
      weight_sum_.push_back(
          at::zeros(
              {shape_.group_out(), depth(slice)},
              weight.options().dtype(c10::CppTypeToScalarType<T>::value)));
    }
  }
}

template <typename S, typename T, typename C>
void DeformConvBackward<S, T, C>::run() {
  if (wants_input_ && !plan_.cut.copies_grad) {
    gradients_.input.zero_();
  }
  if (wants_input_ || wants_taps_ || wants_weight_) {
    const int64_t count = std::min<int64_t>(
        {plan_.images * plan_.slices(),
         at::get_num_threads(),
         std::max<int64_t>(1, kWorkspaceBytes / plan_.slot_bytes)});
    std::vector<Slot> slots;
    for (int64_t i = 0; i < count; ++i) {
      slots.push_back(make_slot());
    }
    // Tasks of one image and slice add to the same pixels, tile after tile.
    for (int64_t tile = 0; tile < plan_.tiles; ++tile) {
      for (int64_t first = 0; first < shape_.batch; first += plan_.images) {
        const int64_t images = std::min(plan_.images, shape_.batch - first);
        run_images(tile, first, images, slots);
      }
    }
  }
  if (wants_weight_) {
    store_weight_gradient();
  }
}

template <typename S, typename T, typename C>
void DeformConvBackward<S, T, C>::run_images(
    int64_t tile,
    int64_t first_image,
    int64_t images,
    std::vector<Slot>& slots) {
  const int64_t begin = tile * plan_.tile;
  const int64_t end = std::min(begin + plan_.tile, shape_.geometry.positions());
  grad_output_.load(first_image, images, begin, end);
  const int64_t tasks = images * plan_.slices();
  const auto task = [&](int64_t index) {
    const int64_t image = first_image + index / plan_.slices();
    return Task{image, tile, index % plan_.slices(), begin, end};
  };
  const int64_t count = static_cast<int64_t>(slots.size());
  for (int64_t first = 0; first < tasks; first += count) {
    const int64_t wave = std::min(count, tasks - first);
    parallel_tasks(wave, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        run_task(task(first + i), slots[i]);
      }
      end_products<C>();
    });
    for (int64_t i = 0; i < wave; ++i) {
      if (wants_weight_) {
        add_weight_sum(task(first + i), slots[i]);
      }
      if (wants_taps_) {
        add_tap_sums(task(first + i), slots[i]);
      }
    }
  }
}

template <typename S, typename T, typename C>
BackwardSlot<T, C> DeformConvBackward<S, T, C>::make_slot() const {
  const auto& g = shape_.geometry;
  const int64_t widest = plan_.cut.widest;
  const int64_t copy = int64_t{g.in_h} * g.in_w * widest;
  const int64_t columns = plan_.block * g.taps() * widest;
  const auto buffer = [](bool needed, int64_t size) {
    // Not value-initialised: every element is written before it is read.
    return std::unique_ptr<T[]>(needed ? new T[size] : nullptr);
  };
  Slot slot;
  slot.input = buffer(plan_.cut.copies_input, copy);
  slot.grad_input = buffer(plan_.cut.copies_grad, copy);
  slot.columns = buffer(true, columns);
  slot.pairs.reset(
      Packing<C>::kPaired && wants_weight_ ? new C[columns] : nullptr);
  slot.taps.reset(new DeformTap<T>[plan_.block * g.taps()]);
  slot.weight_sum =
      buffer(wants_weight_, shape_.group_out() * g.taps() * widest);
  slot.tap_sums = buffer(wants_taps_, plan_.tile * g.taps() * 3);
  return slot;
}

template <typename S, typename T, typename C>
void DeformConvBackward<S, T, C>::run_task(const Task& task, Slot& slot) const {
  const auto& g = shape_.geometry;
  const auto& channels = slice(task);
  if (plan_.cut.copies_grad) {
    std::fill_n(
        slot.grad_input.get(), int64_t{g.in_h} * g.in_w * channels.size, T(0));
  }
  const auto map = map_view<const S>(inputs_.input, task.image, channels.begin);
  if (plan_.cut.copies_input) {
    const auto copy =
        channels_last_view(slot.input.get(), g.in_w, channels.size);
    copy_rows(map, copy, 0, g.in_h, g.in_w, channels.size);
    run_blocks<T>(
        task,
        channels_last_view<const T>(slot.input.get(), g.in_w, channels.size),
        slot);
  } else {
    run_blocks<S>(task, map, slot);
  }
  if (plan_.cut.copies_grad) {
    const auto from = channels_last_view<const T>(
        slot.grad_input.get(), g.in_w, channels.size);
    const auto to = map_view<S>(gradients_.input, task.image, channels.begin);
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
    const MapView<const M>& map,
    Slot& slot) const {
  const auto& g = shape_.geometry;
  const auto& channels = slice(task);
  const int64_t taps = g.taps();
  ColumnGradients<T> wanted{{nullptr, 0, 0, 0}, nullptr, wants_weight_};
  if (plan_.cut.copies_grad) {
    wanted.input =
        channels_last_view(slot.grad_input.get(), g.in_w, channels.size);
  } else if (wants_input_) {
    // The same dtype, or a copy would be made.
    if constexpr (std::is_same_v<S, T>) {
      wanted.input = map_view<T>(gradients_.input, task.image, channels.begin);
    }
  }
  for (int64_t from = task.begin; from < task.end; from += plan_.block) {
    const int64_t to = std::min(from + plan_.block, task.end);
    const Columns<T> columns{
        slot.columns.get(), to - from, taps, channels.size, depth(channels)};
    locate_taps(
        taps_, task.image, channels.offset_group, from, to, slot.taps.get());
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
        wanted.taps = slot.tap_sums.get() + (from - task.begin) * taps * 3;
      }
      backward_columns<M, T>(map, slot.taps.get(), columns, wanted);
    } else {
      gather_columns<M, T, T>(map, slot.taps.get(), taps, columns);
    }
    if (wants_weight_) {
      multiply_weight(task, from, to, slot);
    }
  }
}

// The task's part of the gradient of the weight, from the columns of a block.
template <typename S, typename T, typename C>
void DeformConvBackward<S, T, C>::multiply_weight(
    const Task& task,
    int64_t from,
    int64_t to,
    Slot& slot) const {
  const auto& channels = slice(task);
  const int64_t width = depth(channels);
  const auto planes = grad_output_.planes(task.image, channels.group, from, to);
  Matrix<const C> columns{nullptr, planes.columns, width, width};
  if constexpr (Packing<C>::kPaired) {
    pair_rows(slot.columns.get(), to - from, width, slot.pairs.get());
    columns.data = slot.pairs.get();
  } else {
    columns.data = slot.columns.get();
  }
  gemm(
      planes,
      columns,
      Matrix<T>{slot.weight_sum.get(), shape_.group_out(), width, width},
      from == task.begin ? Store::kOverwrite : Store::kAdd);
}

template <typename S, typename T, typename C>
void DeformConvBackward<S, T, C>::add_weight_sum(
    const Task& task,
    const Slot& slot) {
  T* sum = weight_sum_[task.slice].template data_ptr<T>();
  const T* part = slot.weight_sum.get();
  const int64_t size = shape_.group_out() * depth(slice(task));
  at::parallel_for(0, size, 1 << 15, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      sum[i] += part[i];
    }
  });
}

// Slices of an offset group follow each other, so one sum is open at a time.
template <typename S, typename T, typename C>
void DeformConvBackward<S, T, C>::add_tap_sums(
    const Task& task,
    const Slot& slot) {
  const int64_t size = (task.end - task.begin) * shape_.geometry.taps() * 3;
  const int64_t slices = plan_.slices();
  const int64_t group = slice(task).offset_group;
  const auto other_group = [&](int64_t index) {
    return index < 0 || index == slices ||
        plan_.cut.slices[index].offset_group != group;
  };
  const T* part = slot.tap_sums.get();
  if (other_group(task.slice - 1)) {
    tap_sums_.assign(part, part + size);
  } else {
    for (int64_t i = 0; i < size; ++i) {
      tap_sums_[i] += part[i];
    }
  }
  if (other_group(task.slice + 1)) {
    store_tap_gradients(task);
  }
}

template <typename S, typename T, typename C>
void DeformConvBackward<S, T, C>::store_tap_gradients(const Task& task) const {
  const auto& g = shape_.geometry;
  const T* sums = tap_sums_.data();
  for (int64_t p = task.begin; p < task.end; ++p) {
    for (int tap = 0; tap < g.taps(); ++tap, sums += 3) {
      tap_gradients_.store(
          g, task.image, slice(task).offset_group, p, tap, sums, false);
    }
  }
}

template <typename S, typename T, typename C>
void DeformConvBackward<S, T, C>::store_weight_gradient() const {
  const auto& g = shape_.geometry;
  for (size_t i = 0; i < plan_.cut.slices.size(); ++i) {
    const auto& slice = plan_.cut.slices[i];
    gradients_.weight
        .narrow(0, slice.group * shape_.group_out(), shape_.group_out())
        .narrow(1, slice.begin - slice.group * shape_.group_in(), slice.size)
        .copy_(
            weight_sum_[i]
                .view({shape_.group_out(), g.kernel_h, g.kernel_w, slice.size})
                .permute({0, 3, 1, 2}));
  }
}

template class DeformConvBackward<double, double, double>;
template class DeformConvBackward<float, float, float>;
template class DeformConvBackward<c10::Half, float, float>;
template class DeformConvBackward<c10::BFloat16, float, float>;
template class DeformConvBackward<c10::BFloat16, float, c10::BFloat16>;

} // namespace dcn
