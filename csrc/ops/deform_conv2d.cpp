// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "ops/deform_conv2d.h"

#include <algorithm>
#include <limits>

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>

namespace dcn {
namespace {

constexpr const char* kOp = "deform_conv2d";

// Output size along one axis, an error when the kernel does not fit.
int output_extent(
    int in,
    int kernel,
    int stride,
    int pad,
    int dilation,
    const char* axis) {
  const int64_t reach = static_cast<int64_t>(dilation) * (kernel - 1) + 1;
  const int64_t padded = static_cast<int64_t>(in) + 2 * int64_t(pad);
  const int64_t out = padded < reach ? 0 : (padded - reach) / stride + 1;
  TORCH_CHECK_VALUE(
      out >= 1 && out <= kMaxExtent,
      kOp,
      ": the output ",
      axis,
      " would be ",
      out,
      ": a kernel of ",
      kernel,
      " with dilation ",
      dilation,
      " spans ",
      reach,
      " pixels of an input ",
      axis,
      " of ",
      in,
      " with padding ",
      pad);
  return static_cast<int>(out);
}

void check_offset(const at::Tensor& offset, const DeformConvShape& shape) {
  const auto& g = shape.geometry;
  TORCH_CHECK_VALUE(
      offset.size(0) == shape.batch && offset.size(2) == g.out_h &&
          offset.size(3) == g.out_w,
      kOp,
      ": offset must have the batch of the input and the size of the output, "
      "(",
      shape.batch,
      ", 2 * offset_groups * taps, ",
      g.out_h,
      ", ",
      g.out_w,
      "), got ",
      offset.sizes());
}

void check_mask(const at::Tensor& mask, const DeformConvShape& shape) {
  const auto& g = shape.geometry;
  const std::array<int64_t, 4> expected{
      shape.batch, shape.offset_groups * g.taps(), g.out_h, g.out_w};
  TORCH_CHECK_VALUE(
      mask.sizes() == at::IntArrayRef(expected),
      kOp,
      ": mask must have one channel per tap and offset group, ",
      at::IntArrayRef(expected),
      ", got ",
      mask.sizes());
}

void check_channels(const at::Tensor& weight, DeformConvShape& shape) {
  const int64_t group_in = weight.size(1);
  TORCH_CHECK_VALUE(
      shape.in_channels > 0 && group_in > 0 &&
          shape.in_channels % group_in == 0,
      kOp,
      ": the input's channels must be a positive multiple of weight.size(1), "
      "got ",
      shape.in_channels,
      " and ",
      group_in);
  shape.groups = shape.in_channels / group_in;
  TORCH_CHECK_VALUE(
      shape.out_channels > 0 && shape.out_channels % shape.groups == 0,
      kOp,
      ": weight.size(0) must be a positive multiple of the number of groups, "
      "input.size(1) / weight.size(1) = ",
      shape.groups,
      ", got ",
      shape.out_channels);
}

void check_offset_groups(int64_t offset_channels, DeformConvShape& shape) {
  const int64_t per_group = 2 * int64_t{shape.geometry.taps()};
  TORCH_CHECK_VALUE(
      offset_channels > 0 && offset_channels % per_group == 0,
      kOp,
      ": offset must have 2 * offset_groups * kernel_h * kernel_w channels, a "
      "positive multiple of ",
      per_group,
      ", got ",
      offset_channels);
  shape.offset_groups = offset_channels / per_group;
  TORCH_CHECK_VALUE(
      shape.in_channels % shape.offset_groups == 0,
      kOp,
      ": the number of offset groups, offset.size(1) / (2 * taps) = ",
      shape.offset_groups,
      ", must divide the input's channels, got ",
      shape.in_channels);
}

} // namespace

std::vector<ChannelSlice> DeformConvShape::slices(int64_t max_channels) const {
  std::vector<ChannelSlice> result;
  for (int64_t begin = 0; begin < in_channels;) {
    const int64_t group = begin / group_in();
    const int64_t offset_group = begin / channels_per_offset_group();
    const int64_t end = std::min(
        {(group + 1) * group_in(),
         (offset_group + 1) * channels_per_offset_group(),
         begin + max_channels});
    result.push_back({begin, end - begin, group, offset_group});
    begin = end;
  }
  return result;
}

DeformConvShape check_deform_conv2d(
    const at::Tensor& input,
    const at::Tensor& offset,
    const at::Tensor& weight,
    const OptionalTensor& bias,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    const OptionalTensor& mask) {
  check_float_tensor(kOp, "input", input, 4, "(N, C, H, W)");
  check_float_tensor(kOp, "offset", offset, 4, "(N, 2*G*K, H', W')");
  check_float_tensor(kOp, "weight", weight, 4, "(C', C/groups, kh, kw)");
  check_same_dtype(kOp, "weight", weight, input);
  check_same_device(kOp, "offset", offset, input);
  check_same_device(kOp, "weight", weight, input);
  if (bias) {
    check_float_tensor(kOp, "bias", *bias, 1, "(C',)");
    check_same_dtype(kOp, "bias", *bias, input);
    check_same_device(kOp, "bias", *bias, input);
    TORCH_CHECK_VALUE(
        bias->size(0) == weight.size(0),
        kOp,
        ": bias must have one element per output channel, ",
        weight.size(0),
        ", got ",
        bias->size(0));
  }
  if (mask) {
    check_float_tensor(kOp, "mask", *mask, 4, "(N, G*K, H', W')");
    check_same_device(kOp, "mask", *mask, input);
  }
  const Size2d strides = check_pair(kOp, "stride", stride, 1);
  const Size2d paddings = check_pair(kOp, "padding", padding, 0);
  const Size2d dilations = check_pair(kOp, "dilation", dilation, 1);
  const Size2d in =
      check_pair(kOp, "the input size", input.sizes().slice(2), 1);
  const Size2d kernel =
      check_pair(kOp, "the kernel size", weight.sizes().slice(2), 1);
  TORCH_CHECK_VALUE(
      int64_t{kernel.h} * kernel.w <= kMaxExtent / 2,
      kOp,
      ": the kernel has too many taps: ",
      kernel.h,
      " * ",
      kernel.w);

  DeformConvShape shape{};
  shape.batch = input.size(0);
  shape.in_channels = input.size(1);
  shape.out_channels = weight.size(0);
  auto& g = shape.geometry;
  g = {
      in.h,
      in.w,
      0,
      0,
      kernel.h,
      kernel.w,
      strides.h,
      strides.w,
      paddings.h,
      paddings.w,
      dilations.h,
      dilations.w};
  check_channels(weight, shape);
  g.out_h = output_extent(
      in.h, kernel.h, strides.h, paddings.h, dilations.h, "height");
  g.out_w = output_extent(
      in.w, kernel.w, strides.w, paddings.w, dilations.w, "width");
  check_offset_groups(offset.size(1), shape);
  check_offset(offset, shape);
  if (mask) {
    check_mask(*mask, shape);
  }
  return shape;
}

void check_grad_output(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const DeformConvShape& shape) {
  constexpr const char* op = "_deform_conv2d_backward";
  check_float_tensor(op, "grad_output", grad_output, 4, "(N, C', H', W')");
  check_same_dtype(op, "grad_output", grad_output, input);
  check_same_device(op, "grad_output", grad_output, input);
  const std::array<int64_t, 4> expected{
      shape.batch,
      shape.out_channels,
      shape.geometry.out_h,
      shape.geometry.out_w};
  TORCH_CHECK_VALUE(
      grad_output.sizes() == at::IntArrayRef(expected),
      op,
      ": grad_output must have the shape of the output, ",
      at::IntArrayRef(expected),
      ", got ",
      grad_output.sizes());
}

at::Tensor allocate_output(
    const at::Tensor& input,
    const DeformConvShape& shape) {
  return at::empty(
      {shape.batch,
       shape.out_channels,
       shape.geometry.out_h,
       shape.geometry.out_w},
      input.options().memory_format(memory_format_of(input)));
}

DeformConvGradients allocate_gradients(
    const at::Tensor& input,
    const at::Tensor& offset,
    const at::Tensor& weight,
    const OptionalTensor& mask,
    std::array<bool, 5> output_mask) {
  DeformConvGradients gradients;
  gradients.input = allocate_gradient(input, output_mask[0]);
  gradients.offset = allocate_gradient(offset, output_mask[1]);
  gradients.weight = allocate_gradient(weight, output_mask[2]);
  gradients.bias =
      at::empty({output_mask[3] ? weight.size(0) : 0}, weight.options());
  gradients.mask = mask ? allocate_gradient(*mask, output_mask[4])
                        : at::empty({0}, offset.options());
  return gradients;
}

at::Tensor pack_weight(
    const at::Tensor& weight,
    const DeformConvShape& shape,
    at::ScalarType dtype) {
  return weight
      .reshape(
          {shape.groups,
           shape.group_out(),
           shape.group_in(),
           shape.geometry.taps()})
      .permute({0, 1, 3, 2})
      .to(dtype)
      .contiguous();
}

} // namespace dcn
