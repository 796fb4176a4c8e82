// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Forward pass: for each range of output positions and each group, im2col and a
// batched GEMM (cuBLAS) with the weight.

#include <ATen/Dispatch.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>

#include "cuda/conv/deform_conv2d.cuh"
#include "cuda/conv/deform_im2col.cuh"
#include "cuda/conv/row_ranges.cuh"

namespace dcn::cuda {
namespace {

template <typename S>
class Forward {
  using T = OpMathType<S>;

 public:
  Forward(
      const DeformConvShape& shape,
      const ForwardInputs& inputs,
      const at::Tensor& output)
      : shape_(shape),
        input_(inputs.input),
        offsets_(conv_offsets(shape, inputs.offset, inputs.mask)),
        weight_(
            pack_weight(inputs.weight, shape, output.scalar_type()).flatten(2)),
        bias_(inputs.bias),
        output_(output),
        slices_(shape.slices(shape.in_channels)),
        depth_(shape.geometry.taps() * shape.group_in()),
        max_rows_(
            std::min(
                rows_per_tile(depth_, sizeof(S)),
                std::max<int64_t>(
                    shape.batch * shape.geometry.positions(),
                    1))),
        columns_(at::empty({max_rows_, depth_}, output.options())) {}

  void run() {
    const int64_t image_bytes = int64_t{shape_.geometry.in_h} *
        shape_.geometry.in_w * shape_.in_channels * int64_t{sizeof(S)};
    if (input_.stride(1) == 1 || image_bytes > kCopyBytes) {
      run_images(0, shape_.batch, input_);
      return;
    }
    const int64_t images = kCopyBytes / std::max<int64_t>(image_bytes, 1);
    for (int64_t first = 0; first < shape_.batch; first += images) {
      const int64_t count = std::min(images, shape_.batch - first);
      run_images(
          first,
          count,
          input_.narrow(0, first, count)
              .contiguous(at::MemoryFormat::ChannelsLast));
    }
  }

 private:
  // `maps` holds images [first, first + count).
  void run_images(int64_t first, int64_t count, const at::Tensor& maps) {
    for_each_range(
        count,
        shape_.geometry.positions(),
        max_rows_,
        [&](const RowRange& range) {
          for (int64_t group = 0; group < shape_.groups; ++group) {
            im2col(first, range, group, maps);
            gemm(first, range, group);
          }
        });
  }

  // Computes the columns of one group, (rows, taps, group_in).
  void im2col(
      int64_t first,
      const RowRange& range,
      int64_t group,
      const at::Tensor& maps) {
    for (const auto& slice : slices_) {
      if (slice.group != group) {
        continue;
      }
      const int64_t within = slice.begin - group * shape_.group_in();
      deform_im2col(
          Im2colTile<S, T>{
              offsets_,
              slice.offset_group,
              first + range.image,
              range.image,
              range.images,
              static_cast<int>(range.position / shape_.geometry.out_w),
              static_cast<int>(range.position % shape_.geometry.out_w),
              range.positions,
              slice.size,
              feature_map_view<const S>(maps, 0, slice.begin),
              maps.stride(0),
              columns_.data_ptr<S>() + within,
              depth_,
              shape_.group_in(),
              0});
    }
  }

  // output = weight * columns + bias, written in the memory format of the
  // output.
  void gemm(int64_t first, RowRange range, int64_t group) {
    const int64_t channels = shape_.group_out();
    at::Tensor columns = columns_.narrow(0, 0, range.rows())
                             .view({range.images, range.positions, depth_})
                             .transpose(1, 2);
    at::Tensor weight = weight_[group].expand({range.images, channels, depth_});
    range.image += first;
    at::Tensor out =
        range_view(output_, range).narrow(1, group * channels, channels);
    at::Tensor bias;
    if (bias_) {
      bias = bias_->narrow(0, group * channels, channels)
                 .view({1, channels, 1})
                 .expand_as(out);
    }
    if (out.stride(2) != 1) { // channels-last: the transposed GEMM
      out = out.transpose(1, 2);
      std::swap(weight, columns);
      weight = weight.transpose(1, 2);
      columns = columns.transpose(1, 2);
      bias = bias.defined() ? bias.transpose(1, 2) : bias;
    }
    if (bias.defined()) {
      at::baddbmm_out(out, bias, weight, columns);
    } else {
      at::bmm_out(out, weight, columns);
    }
  }

  const DeformConvShape& shape_;
  const at::Tensor& input_;
  ConvOffsets offsets_;
  at::Tensor weight_; // (groups, group_out, taps * group_in)
  const OptionalTensor& bias_;
  const at::Tensor& output_;
  std::vector<ChannelSlice> slices_;
  int64_t depth_;
  int64_t max_rows_;
  at::Tensor columns_;
};

} // namespace

void deform_conv2d_forward(
    const DeformConvShape& shape,
    const ForwardInputs& inputs,
    const at::Tensor& output) {
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, output.scalar_type(), "deform_conv2d", [&] {
        Forward<scalar_t>(shape, inputs, output).run();
      });
}

} // namespace dcn::cuda
