// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "cpu/conv/packed_weight.h"

#include <algorithm>
#include <utility>

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "cpu/conv/gemm.h"
#include "cpu/parallel.h"
#include "cpu/transpose.h"
#include "ops/any_dtype_view.h"

namespace dcn::cpu {
namespace {

// Between a depth of 256 and 768 the GEMM runs at the processor's peak; it is
// slower above, and many small GEMMs are slower too.
constexpr int64_t kDepth = 640;
// Output channels per task.
constexpr int64_t kOutputs = 64;
// Channels that are transposed at a time.
constexpr int64_t kChannels = 16;

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Element access to the weight, or its gradient, of one slice of channels, with
// any strides.
template <typename S>
struct WeightView {
  S* data;
  int64_t output_stride;
  int64_t channel_stride;
  int64_t row_stride;
  int64_t column_stride;
  int64_t kernel_w;

  WeightView(
      const at::Tensor& weight,
      const DeformConvShape& shape,
      const ChannelSlice& slice)
      : output_stride(weight.stride(0)),
        channel_stride(weight.stride(1)),
        row_stride(weight.stride(2)),
        column_stride(weight.stride(3)),
        kernel_w(shape.geometry.kernel_w) {
    const int64_t within = slice.begin - slice.group * shape.group_in();
    data = weight.data_ptr<S>() +
        slice.group * shape.group_out() * output_stride +
        within * channel_stride;
  }

  S* at(int64_t output, int64_t channel, int64_t tap) const {
    return data + output * output_stride + channel * channel_stride +
        tap / kernel_w * row_stride + tap % kernel_w * column_stride;
  }
};

// Writes a row of a right operand from `row` on.
template <typename T, typename C>
void store_operand_row(const T* values, int64_t columns, C* row) {
  for (int64_t i = 0; i < columns; ++i) {
    row[i * OperandLayout<C>::kColumnStep] = static_cast<C>(values[i]);
  }
}

// Packs channels [first, first + channels) of a slice of the filters of
// outputs [begin, end), which are those of a panel, through a buffer that they
// are transposed to in the order of the memory.
template <typename S, typename C>
void pack_channels(
    const WeightView<S>& view,
    const int64_t* first_rows, // of each tap
    int64_t taps,
    int64_t first,
    int64_t channels,
    int64_t begin,
    int64_t end,
    std::vector<OpMathType<S>>& buffer,
    C* panel) {
  using T = OpMathType<S>;
  const int64_t width = end - begin;
  const bool taps_outside = view.channel_stride == 1;
  const int64_t outer = taps_outside ? taps : 1;
  const int64_t elements = channels * taps / outer;
  const T* const no_bias = nullptr;
  buffer.resize(channels * taps * width);
  for (int64_t tap = 0; tap < outer; ++tap) {
    transpose<S, T, false, T>(
        view.at(begin, first, tap),
        view.output_stride,
        width,
        elements,
        no_bias,
        buffer.data() + tap * elements * width,
        width);
  }
  for (int64_t tap = 0; tap < taps; ++tap) {
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t row = taps_outside ? tap * channels + c : c * taps + tap;
      store_operand_row(
          buffer.data() + row * width,
          width,
          panel +
              OperandLayout<C>::row_offset(first_rows[tap] + first + c, width));
    }
  }
}

template <typename Body>
void parallel_over_outputs(int64_t outer, int64_t outputs, const Body& body) {
  const int64_t tiles = (outputs + kOutputs - 1) / kOutputs;
  parallel_tasks(outer * tiles, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % tiles * kOutputs;
      body(task / tiles, first, std::min(first + kOutputs, outputs));
    }
  });
}

} // namespace

KBlocking::KBlocking(const DeformConvShape& shape, int64_t alignment)
    : slices(shape.slices(kDepth)),
      blocks_of_group(shape.groups),
      max_depth(0),
      rows(0) {
  const int64_t taps = shape.geometry.taps();
  const int64_t depth = taps * shape.group_in();
  // As few blocks as possible, all of about the same depth.
  const int64_t blocks = std::max<int64_t>((depth + kDepth / 2) / kDepth, 1);
  const int64_t target = (depth + blocks - 1) / blocks;
  int64_t open_group = -1;
  KBlock block{};
  const auto close = [&] {
    if (open_group >= 0) {
      rows = round_up(rows + block.depth, alignment);
      max_depth = std::max(max_depth, block.depth);
      blocks_of_group[open_group].push_back(std::move(block));
    }
    block = {{}, 0, rows};
  };
  for (const auto& slice : slices) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      if (slice.group != open_group ||
          (block.depth > 0 && block.depth + slice.size / 2 > target)) {
        close();
        open_group = slice.group;
      }
      first_rows.push_back(block.row + block.depth);
      if (!block.segments.empty() &&
          block.segments.back().slice.begin == slice.begin) {
        ++block.segments.back().taps;
      } else {
        block.segments.push_back({slice, tap, 1, block.depth});
      }
      block.depth += slice.size;
    }
  }
  close();
}

template <typename S, typename C>
at::Tensor pack_forward_weight(
    const at::Tensor& weight,
    const DeformConvShape& shape,
    const KBlocking& k_blocking) {
  const int64_t taps = shape.geometry.taps();
  const int64_t outputs = shape.group_out();
  const int64_t slices = static_cast<int64_t>(k_blocking.slices.size());
  // Aligned blocks may leave rows between them, which have to be zero.
  const auto options =
      weight.options().dtype(c10::CppTypeToScalarType<C>::value);
  const at::Tensor packed = OperandLayout<C>::kVnni
      ? at::zeros({k_blocking.rows, outputs}, options)
      : at::empty({k_blocking.rows, outputs}, options);
  C* const data = packed.data_ptr<C>();
  // The channels or the elements of a filter are contiguous.
  const at::Tensor filters =
      weight.is_contiguous(at::MemoryFormat::ChannelsLast)
      ? weight
      : weight.contiguous();
  std::vector<std::pair<int64_t, int64_t>> panels;
  for_each_panel(outputs, [&](int64_t begin, int64_t end) {
    panels.emplace_back(begin, end);
  });
  const int64_t count = static_cast<int64_t>(panels.size());
  parallel_tasks(slices * count, [&](int64_t task, int64_t last) {
    std::vector<OpMathType<S>> buffer;
    for (; task < last; ++task) {
      const int64_t index = task / count;
      const auto [begin, end] = panels[task % count];
      const auto& slice = k_blocking.slices[index];
      const WeightView<S> view(filters, shape, slice);
      for (int64_t first = 0; first < slice.size; first += kChannels) {
        pack_channels<S, C>(
            view,
            k_blocking.first_rows.data() + index * taps,
            taps,
            first,
            std::min(kChannels, slice.size - first),
            begin,
            end,
            buffer,
            data + begin * k_blocking.rows);
      }
    }
  });
  return packed;
}

at::Tensor pack_filters(
    const at::Tensor& weight,
    const DeformConvShape& shape,
    const KBlocking& k_blocking) {
  const int64_t taps = shape.geometry.taps();
  const int64_t outputs = shape.group_out();
  const at::Tensor packed =
      at::empty({outputs, k_blocking.rows}, weight.options());
  for (size_t i = 0; i < k_blocking.slices.size(); ++i) {
    const auto& slice = k_blocking.slices[i];
    const WeightView<float> view(weight, shape, slice);
    const int64_t* first_rows = k_blocking.first_rows.data() + i * taps;
    for (int64_t o = 0; o < outputs; ++o) {
      float* filter = packed.data_ptr<float>() + o * k_blocking.rows;
      for (int64_t tap = 0; tap < taps; ++tap) {
        for (int64_t c = 0; c < slice.size; ++c) {
          filter[first_rows[tap] + c] = *view.at(o, c, tap);
        }
      }
    }
  }
  return packed;
}

template <typename S, typename C>
std::vector<at::Tensor> pack_backward_weight(
    const at::Tensor& weight,
    const DeformConvShape& shape,
    const std::vector<ChannelSlice>& slices) {
  const int64_t taps = shape.geometry.taps();
  const int64_t outputs = shape.group_out();
  const auto options =
      weight.options().dtype(c10::CppTypeToScalarType<C>::value);
  const int64_t rows = OperandLayout<C>::padded_k(outputs);
  std::vector<at::Tensor> packed;
  for (const auto& slice : slices) {
    const int64_t depth = taps * slice.size;
    // A row of padding has to be zero.
    packed.push_back(
        rows > outputs ? at::zeros({rows, depth}, options)
                       : at::empty({rows, depth}, options));
  }
  parallel_over_outputs(
      static_cast<int64_t>(slices.size()),
      outputs,
      [&](int64_t index, int64_t begin, int64_t end) {
        const auto& slice = slices[index];
        const int64_t depth = taps * slice.size;
        const WeightView<S> view(weight, shape, slice);
        C* const data = packed[index].data_ptr<C>();
        for (int64_t o = begin; o < end; ++o) {
          C* to = data + OperandLayout<C>::row_offset(o, depth);
          for (int64_t tap = 0; tap < taps; ++tap) {
            const S* from = view.at(o, 0, tap);
            for (int64_t c = 0; c < slice.size; ++c) {
              *to = static_cast<C>(from[c * view.channel_stride]);
              to += OperandLayout<C>::kColumnStep;
            }
          }
        }
      });
  return packed;
}

template <typename T, typename S>
void unpack_weight_gradient(
    const T* packed,
    const DeformConvShape& shape,
    const std::vector<ChannelSlice>& slices,
    const at::Tensor& weight) {
  const int64_t taps = shape.geometry.taps();
  const int64_t outputs = shape.group_out();
  parallel_over_outputs(
      static_cast<int64_t>(slices.size()),
      outputs,
      [&](int64_t index, int64_t begin, int64_t end) {
        const auto& slice = slices[index];
        const WeightView<S> view(weight, shape, slice);
        const T* from =
            packed + (slice.begin * outputs + begin * slice.size) * taps;
        for (int64_t o = begin; o < end; ++o) {
          for (int64_t tap = 0; tap < taps; ++tap) {
            S* to = view.at(o, 0, tap);
            for (int64_t c = 0; c < slice.size; ++c) {
              to[c * view.channel_stride] = round_to<S>(*from++);
            }
          }
        }
      });
}

#define DCN_INSTANTIATE_PACKING(S, C)                               \
  template at::Tensor pack_forward_weight<S, C>(                    \
      const at::Tensor&, const DeformConvShape&, const KBlocking&); \
  template std::vector<at::Tensor> pack_backward_weight<S, C>(      \
      const at::Tensor&,                                            \
      const DeformConvShape&,                                       \
      const std::vector<ChannelSlice>&);

DCN_INSTANTIATE_PACKING(double, double)
DCN_INSTANTIATE_PACKING(float, float)
DCN_INSTANTIATE_PACKING(c10::Half, float)
DCN_INSTANTIATE_PACKING(c10::BFloat16, float)
DCN_INSTANTIATE_PACKING(c10::BFloat16, c10::BFloat16)
#undef DCN_INSTANTIATE_PACKING

#define DCN_INSTANTIATE_UNPACKING(T, S)       \
  template void unpack_weight_gradient<T, S>( \
      const T*,                               \
      const DeformConvShape&,                 \
      const std::vector<ChannelSlice>&,       \
      const at::Tensor&);

DCN_INSTANTIATE_UNPACKING(double, double)
DCN_INSTANTIATE_UNPACKING(float, float)
DCN_INSTANTIATE_UNPACKING(float, c10::Half)
DCN_INSTANTIATE_UNPACKING(float, c10::BFloat16)
#undef DCN_INSTANTIATE_UNPACKING

} // namespace dcn::cpu
