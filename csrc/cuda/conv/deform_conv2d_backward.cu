// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Backward pass: for each slice of input channels and each range of output
// positions
//   GEMM    grad_columns = grad_output * weight
//   col2im  gradients of input, offset and mask; recomputes the columns
//   GEMM    grad_weight += grad_output^T * columns

#include <type_traits>

#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include "cuda/conv/deform_conv2d.cuh"
#include "cuda/conv/deform_im2col.cuh"
#include "cuda/conv/row_ranges.cuh"
#include "ops/backward_tiling.h"

namespace dcn::cuda {
namespace {

// Slices with fewer channels are not copied.
constexpr int64_t kMinCopiedChannels = 16;
// Per tap, the keys and indices that the deterministic col2im sorts.
constexpr int64_t kSortBytes = 4 * 4 * sizeof(int64_t);

template <typename S>
class Backward {
  using T = OpMathType<S>;
  static constexpr bool kAccumulatesInDtype = std::is_same_v<S, T>;
  static constexpr auto kAccumulator = c10::CppTypeToScalarType<T>::value;

 public:
  Backward(
      const BackwardInputs& inputs,
      const at::Tensor& weight,
      const DeformConvGradients& gradients)
      : inputs_(inputs),
        shape_(inputs.shape),
        gradients_(gradients),
        offsets_(conv_offsets(inputs.shape, inputs.offset, inputs.mask)),
        wants_input_(gradients.input.numel() > 0),
        wants_offsets_(gradients.offset.numel() + gradients.mask.numel() > 0),
        wants_weight_(gradients.weight.numel() > 0),
        deterministic_(at::globalContext().deterministicAlgorithms()),
        weight_(pack_weight(weight, shape_, weight.scalar_type())),
        tiling_(
            inputs,
            wants_input_,
            kAccumulatesInDtype,
            true,
            {shape_.in_channels,
             kMinCopiedChannels,
             kCopyBytes,
             sizeof(S),
             sizeof(T)}) {}

  void run() {
    if (wants_input_ && !tiling_.copies_grad) {
      gradients_.input.zero_();
    }
    if (wants_weight_) {
      // The accumulator of all slices, in float32 at least.
      grad_weight_ =
          at::zeros(weight_.sizes(), weight_.options().dtype(kAccumulator));
    }
    const bool wants_any = wants_input_ || wants_weight_ || wants_offsets_;
    const int64_t images = images_per_range();
    for (int64_t first = 0; wants_any && first < shape_.batch;
         first += images) {
      const int64_t count = std::min(images, shape_.batch - first);
      const DeformConvGradients sums = offset_sums(first, count);
      offset_gradients_ = conv_offset_gradients(sums);
      for (size_t i = 0; i < tiling_.slices.size(); ++i) {
        run_slice(first, count, tiling_.slices[i], accumulates_offsets(i));
      }
      copy_sums(sums.offset, gradients_.offset, first, count);
      copy_sums(sums.mask, gradients_.mask, first, count);
    }
    if (wants_weight_) {
      const auto& g = shape_.geometry;
      gradients_.weight.copy_(grad_weight_.permute({0, 1, 3, 2})
                                  .reshape(
                                      {shape_.out_channels,
                                       shape_.group_in(),
                                       g.kernel_h,
                                       g.kernel_w}));
    }
  }

 private:
  // Whether slice i adds to the offset gradients of the slice before.
  bool accumulates_offsets(size_t i) const {
    return i > 0 &&
        tiling_.slices[i - 1].offset_group == tiling_.slices[i].offset_group;
  }

  // Whether the gradient, of an offset or mask, is summed over slices in
  // another dtype than its own. No slice spans two offset groups.
  bool needs_sums(const at::Tensor& gradient) const {
    const auto slices = static_cast<int64_t>(tiling_.slices.size());
    return slices > shape_.offset_groups &&
        gradient.element_size() < int64_t{sizeof(T)};
  }

  // As many images as the channels-last copies and the sums allow.
  int64_t images_per_range() const {
    int64_t bytes = tiling_.copy_bytes;
    for (const at::Tensor& gradient : {gradients_.offset, gradients_.mask}) {
      if (gradient.numel() > 0 && needs_sums(gradient)) {
        bytes += gradient[0].numel() * int64_t{sizeof(T)};
      }
    }
    return std::max<int64_t>(kCopyBytes / std::max<int64_t>(bytes, 1), 1);
  }

  // Where the offset gradients of a range of images are summed.
  DeformConvGradients offset_sums(int64_t first, int64_t count) const {
    const auto sum = [&](const at::Tensor& gradient) {
      if (gradient.numel() == 0) {
        return gradient;
      }
      const at::Tensor images = gradient.narrow(0, first, count);
      return needs_sums(gradient)
          ? at::empty(images.sizes(), images.options().dtype(kAccumulator))
          : images;
    };
    return {{}, sum(gradients_.offset), {}, {}, sum(gradients_.mask)};
  }

  static void copy_sums(
      const at::Tensor& sums,
      const at::Tensor& gradient,
      int64_t first,
      int64_t count) {
    if (sums.scalar_type() != gradient.scalar_type()) {
      gradient.narrow(0, first, count).copy_(sums);
    }
  }

  void run_slice(
      int64_t first,
      int64_t count,
      const ChannelSlice& slice,
      bool accumulates_offsets) {
    const auto slice_of = [&](const at::Tensor& tensor) {
      return tensor.narrow(0, first, count).narrow(1, slice.begin, slice.size);
    };
    at::Tensor map = slice_of(inputs_.input);
    if (tiling_.copies_input) {
      map = map.contiguous(at::MemoryFormat::ChannelsLast);
    }
    at::Tensor grad_input;
    if (tiling_.copies_grad) {
      grad_input = at::empty(
          map.sizes(),
          map.options()
              .dtype(kAccumulator)
              .memory_format(at::MemoryFormat::ChannelsLast));
      grad_input.zero_();
    } else if (wants_input_) {
      grad_input = slice_of(gradients_.input);
    }
    Im2colGradients<T> wanted{
        {nullptr, 0, 0, 0},
        0,
        offset_gradients_,
        accumulates_offsets,
        wants_weight_};
    if (grad_input.defined()) {
      wanted.input = feature_map_view<T>(grad_input, 0, 0);
      wanted.input_stride = grad_input.stride(0);
    }
    run_tiles(first, count, slice, map, wanted);
    if (tiling_.copies_grad) {
      slice_of(gradients_.input).copy_(grad_input);
    }
  }

  void run_tiles(
      int64_t first,
      int64_t count,
      const ChannelSlice& slice,
      const at::Tensor& map,
      const Im2colGradients<T>& wanted) {
    const int64_t taps = shape_.geometry.taps();
    const int64_t depth = taps * slice.size;
    // The range of grad_output may be copied too.
    int64_t rows =
        rows_per_tile(std::max(depth, shape_.group_out()), sizeof(S));
    if (deterministic_) {
      rows = std::clamp<int64_t>(kColumnBytes / (taps * kSortBytes), 1, rows);
    }
    const int64_t within = slice.begin - slice.group * shape_.group_in();
    const at::Tensor weight = weight_[slice.group]
                                  .narrow(2, within, slice.size)
                                  .reshape({shape_.group_out(), depth});
    for_each_range(
        count, shape_.geometry.positions(), rows, [&](RowRange range) {
          const Im2colTile<S, T> tile{
              offsets_,
              slice.offset_group,
              first + range.image,
              range.image,
              range.images,
              static_cast<int>(range.position / shape_.geometry.out_w),
              static_cast<int>(range.position % shape_.geometry.out_w),
              range.positions,
              slice.size,
              feature_map_view<const S>(map, 0, 0),
              map.stride(0),
              nullptr,
              depth,
              slice.size,
              0};
          range.image += first;
          const at::Tensor grad_rows = grad_output_rows(range, slice.group);
          const at::Tensor columns = run_tile(tile, grad_rows, weight, wanted);
          if (wants_weight_) {
            grad_weight_[slice.group]
                .narrow(2, within, slice.size)
                .add_(
                    at::mm(grad_rows.t(), columns)
                        .view({shape_.group_out(), taps, slice.size}));
          }
        });
  }

  // Returns the columns, if wants_weight_.
  at::Tensor run_tile(
      Im2colTile<S, T> tile,
      const at::Tensor& grad_rows,
      const at::Tensor& weight,
      const Im2colGradients<T>& wanted) {
    if (!wants_input_ && !wants_offsets_) {
      const at::Tensor columns =
          at::empty({tile.rows(), weight.size(1)}, weight.options());
      tile.columns = columns.data_ptr<S>();
      deform_im2col(tile);
      return columns;
    }
    const at::Tensor columns = at::mm(grad_rows, weight);
    tile.columns = columns.data_ptr<S>();
    if (deterministic_ && wants_input_) {
      col2im_deterministic(tile, wanted, weight.options());
      Im2colGradients<T> offsets_only = wanted;
      offsets_only.input.data = nullptr;
      deform_im2col_backward(tile, offsets_only);
    } else {
      deform_im2col_backward(tile, wanted);
    }
    return columns;
  }

  // The range of grad_output of a group, (rows, group_out).
  at::Tensor grad_output_rows(const RowRange& range, int64_t group) const {
    const int64_t channels = shape_.group_out();
    return range_view(
               inputs_.grad_output.narrow(1, group * channels, channels), range)
        .transpose(1, 2)
        .reshape({range.rows(), channels});
  }

  BackwardInputs inputs_;
  const DeformConvShape& shape_;
  DeformConvGradients gradients_;
  ConvOffsets offsets_;
  ConvOffsetGradients offset_gradients_; // of the current range of images
  bool wants_input_;
  bool wants_offsets_;
  bool wants_weight_;
  bool deterministic_;
  at::Tensor weight_; // (groups, group_out, taps, group_in)
  at::Tensor grad_weight_; // the same shape
  ConvChannelTiling tiling_;
};

} // namespace

void deform_conv2d_backward(
    const BackwardInputs& inputs,
    const at::Tensor& weight,
    const DeformConvGradients& gradients) {
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf,
      at::kBFloat16,
      weight.scalar_type(),
      "_deform_conv2d_backward",
      [&] { Backward<scalar_t>(inputs, weight, gradients).run(); });
  if (gradients.bias.numel() > 0) {
    gradients.bias.copy_(inputs.grad_output.sum({0, 2, 3}));
  }
}

} // namespace dcn::cuda
