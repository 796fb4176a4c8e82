// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// The backward pass is cut into tasks (image, tile of output positions, slice
// of input channels). A task owns its run of grad_input; what it adds to the
// gradients of the weight and of the taps goes to buffers of its own, which are
// summed in task order after each wave of tasks. So there are no locks and no
// atomics, and the sums do not depend on the number of threads.

#include "cpu/deform_conv2d_backward.h"

#include <algorithm>
#include <type_traits>

#include <ATen/ops/zeros_like.h>

#include "cpu/copy_rows.h"
#include "cpu/parallel.h"

namespace dcn {
namespace {

// All slots together.
constexpr int64_t kWorkspaceBytes = int64_t{48} << 20;

} // namespace

template <typename S, typename T>
DeformConvBackward<S, T>::DeformConvBackward(
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
      plan_(inputs, wants_input_, std::is_same_v<S, T>, sizeof(T)),
      taps_(tap_source(inputs.shape, inputs.offset, inputs.mask)) {
  const at::Tensor packed =
      pack_weight(weight, shape_, c10::CppTypeToScalarType<T>::value);
  for (const auto& slice : plan_.cut.slices) {
    const int64_t within = slice.begin - slice.group * shape_.group_in();
    weight_.push_back(packed.select(0, slice.group)
                          .narrow(2, within, slice.size)
                          .contiguous());
  }
}

template <typename S, typename T>
void DeformConvBackward<S, T>::run() {
  if (wants_weight_) {
    for (const auto& weight : weight_) {
      weight_sum_.push_back(at::zeros_like(weight));
    }
  }
  if (wants_input_ && !plan_.cut.copies_grad) {
    gradients_.input.zero_();
  }
  const int64_t tasks = wants_input_ || wants_taps_ || wants_weight_
      ? plan_.tasks(shape_.batch)
      : 0;
  // Tasks of one image and slice add to the same pixels, tile after tile: they
  // are this far apart, and must not meet in one wave.
  const int64_t apart = wants_input_ ? tasks / plan_.tiles : tasks;
  const int64_t count = std::min<int64_t>(
      {apart,
       at::get_num_threads(),
       std::max<int64_t>(1, kWorkspaceBytes / plan_.slot_bytes)});
  std::vector<BackwardSlot<T>> slots;
  for (int64_t i = 0; i < count; ++i) {
    slots.push_back(make_slot());
  }
  for (int64_t first = 0; first < tasks; first += count) {
    const int64_t wave = std::min(count, tasks - first);
    parallel_tasks(wave, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        run_task(task(first + i), slots[i]);
      }
    });
    for (int64_t i = 0; i < wave; ++i) {
      const Task done = task(first + i);
      if (wants_weight_) {
        add_weight_sum(done, slots[i]);
      }
      if (wants_taps_) {
        add_tap_sums(done, slots[i]);
      }
    }
  }
  if (wants_weight_) {
    store_weight_gradient();
  }
}

template <typename S, typename T>
typename DeformConvBackward<S, T>::Task DeformConvBackward<S, T>::task(
    int64_t index) const {
  const int64_t slices = static_cast<int64_t>(plan_.cut.slices.size());
  Task task;
  task.slice = index % slices;
  task.image = index / slices % shape_.batch;
  task.tile = index / slices / shape_.batch;
  task.begin = task.tile * plan_.tile;
  task.end = std::min(task.begin + plan_.tile, shape_.geometry.positions());
  return task;
}

template <typename S, typename T>
BackwardSlot<T> DeformConvBackward<S, T>::make_slot() const {
  const auto& g = shape_.geometry;
  const int64_t widest = plan_.cut.widest;
  const auto buffer = [](bool needed, int64_t size) {
    // Not value-initialised: every element is written before it is read.
    return std::unique_ptr<T[]>(needed ? new T[size] : nullptr);
  };
  const int64_t copy = int64_t{g.in_h} * g.in_w * widest;
  BackwardSlot<T> slot;
  slot.input = buffer(plan_.cut.copies_input, copy);
  slot.grad_input = buffer(plan_.cut.copies_grad, copy);
  slot.grad_output = buffer(true, plan_.block * shape_.group_out());
  slot.columns = buffer(true, plan_.block * g.taps() * widest);
  slot.taps.reset(new DeformTap<T>[plan_.block * g.taps()]);
  slot.weight_sum =
      buffer(wants_weight_, shape_.group_out() * g.taps() * widest);
  slot.tap_sums = buffer(wants_taps_, plan_.tile * g.taps() * 3);
  return slot;
}

template <typename S, typename T>
void DeformConvBackward<S, T>::run_task(const Task& task, BackwardSlot<T>& slot)
    const {
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

template <typename S, typename T>
template <typename M>
void DeformConvBackward<S, T>::run_blocks(
    const Task& task,
    const MapView<const M>& map,
    BackwardSlot<T>& slot) const {
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
  const auto weight = row_major(
      weight_[task.slice].template data_ptr<T>(),
      shape_.group_out(),
      depth(channels));
  for (int64_t from = task.begin; from < task.end; from += plan_.block) {
    const int64_t to = std::min(from + plan_.block, task.end);
    const Columns<T> columns{
        slot.columns.get(),
        to - from,
        taps,
        taps * channels.size,
        channels.size,
        channels.size};
    const auto flat = row_major(columns.data, to - from, depth(channels));
    const auto grad_output = grad_output_block(task, from, to, slot);
    locate_taps(
        taps_, task.image, channels.offset_group, from, to, slot.taps.get());
    if (wants_input_ || wants_taps_) {
      gemm(grad_output, weight, flat, Store::kOverwrite);
      if (wants_taps_) {
        wanted.taps = slot.tap_sums.get() + (from - task.begin) * taps * 3;
      }
      backward_columns<M, T>(map, slot.taps.get(), columns, wanted);
    } else {
      gather_columns<M, T>(map, slot.taps.get(), columns);
    }
    if (wants_weight_) {
      gemm(
          grad_output.transposed(),
          flat,
          row_major(slot.weight_sum.get(), shape_.group_out(), depth(channels)),
          from == task.begin ? Store::kOverwrite : Store::kAdd);
    }
  }
}

// grad_output as (positions, group_out): in place where a GEMM can read it.
template <typename S, typename T>
Matrix<T> DeformConvBackward<S, T>::grad_output_block(
    const Task& task,
    int64_t from,
    int64_t to,
    BackwardSlot<T>& slot) const {
  const auto& grad = inputs_.grad_output;
  const int64_t group = slice(task).group;
  const int64_t channels = shape_.group_out();
  const auto map = map_view<S>(grad, task.image, group * channels);
  if constexpr (std::is_same_v<S, T>) {
    if (grad.is_contiguous() ||
        grad.is_contiguous(at::MemoryFormat::ChannelsLast)) {
      // Of an axis of one element the stride says nothing.
      const int64_t stride =
          shape_.geometry.out_w == 1 ? map.row_stride : map.column_stride;
      return {
          map.data + from * stride,
          to - from,
          channels,
          stride,
          map.channel_stride};
    }
  }
  const int64_t width = shape_.geometry.out_w;
  T* row = slot.grad_output.get();
  for (int64_t p = from; p < to; ++p) {
    const S* pixel = map.pixel(p / width, p % width);
    for (int64_t c = 0; c < channels; ++c) {
      *row++ = static_cast<T>(pixel[c * map.channel_stride]);
    }
  }
  return row_major(slot.grad_output.get(), to - from, channels);
}

template <typename S, typename T>
void DeformConvBackward<S, T>::add_weight_sum(
    const Task& task,
    const BackwardSlot<T>& slot) {
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
template <typename S, typename T>
void DeformConvBackward<S, T>::add_tap_sums(
    const Task& task,
    const BackwardSlot<T>& slot) {
  const int64_t size = (task.end - task.begin) * shape_.geometry.taps() * 3;
  const int64_t slices = static_cast<int64_t>(plan_.cut.slices.size());
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

template <typename S, typename T>
void DeformConvBackward<S, T>::store_tap_gradients(const Task& task) const {
  const auto& g = shape_.geometry;
  const T* sums = tap_sums_.data();
  for (int64_t p = task.begin; p < task.end; ++p) {
    for (int tap = 0; tap < g.taps(); ++tap, sums += 3) {
      tap_gradients_.store(
          g, task.image, slice(task).offset_group, p, tap, sums, false);
    }
  }
}

template <typename S, typename T>
void DeformConvBackward<S, T>::store_weight_gradient() const {
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

template class DeformConvBackward<double, double>;
template class DeformConvBackward<float, float>;
template class DeformConvBackward<c10::Half, float>;
template class DeformConvBackward<c10::BFloat16, float>;

} // namespace dcn
