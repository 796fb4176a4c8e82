// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "ops/roi_pool.h"

#include <array>
#include <cmath>

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include "ops/any_dtype_view.h"

namespace dcn {
namespace {

constexpr const char* kOp = "deform_roi_pool";

RoiMode check_mode(std::string_view mode) {
  TORCH_CHECK_VALUE(
      mode == "align" || mode == "bin" || mode == "msra",
      kOp,
      ": mode must be 'align', 'bin' or 'msra', got '",
      mode,
      "'");
  return mode == "align" ? RoiMode::kAlign
      : mode == "bin"    ? RoiMode::kBin
                         : RoiMode::kMsra;
}

void check_numbers(const RoiPoolArguments& arguments) {
  TORCH_CHECK_VALUE(
      std::isfinite(arguments.spatial_scale) && arguments.spatial_scale > 0,
      kOp,
      ": spatial_scale must be a positive number, got ",
      arguments.spatial_scale);
  TORCH_CHECK_VALUE(
      arguments.sampling_ratio >= 0 && arguments.sampling_ratio <= kMaxExtent,
      kOp,
      ": sampling_ratio must be from 0 (adaptive) to ",
      kMaxExtent,
      ", got ",
      arguments.sampling_ratio);
  TORCH_CHECK_VALUE(
      std::isfinite(arguments.gamma),
      kOp,
      ": gamma must be a finite number, got ",
      arguments.gamma);
}

void check_offset(const at::Tensor& offset, RoiPoolShape& shape) {
  TORCH_CHECK_VALUE(
      offset.size(0) == shape.rois && offset.size(1) > 0 &&
          offset.size(1) % 2 == 0 && offset.size(2) == shape.parts.h &&
          offset.size(3) == shape.parts.w,
      kOp,
      ": offset must have two channels per class and the size of the parts, (",
      shape.rois,
      ", 2 * classes, ",
      shape.parts.h,
      ", ",
      shape.parts.w,
      "), got ",
      offset.sizes());
  shape.classes = offset.size(1) / 2;
  TORCH_CHECK_VALUE(
      shape.channels % shape.classes == 0,
      kOp,
      ": the number of classes, offset.size(1) / 2 = ",
      shape.classes,
      ", must divide the output's channels, got ",
      shape.channels);
}

void check_batch_indices(const at::Tensor& boxes, int64_t batch) {
  const AnyDtypeView view(boxes.unsqueeze(2).unsqueeze(3));
  for (int64_t roi = 0; roi < boxes.size(0); ++roi) {
    const double index = view.load<double>(view.at(roi, 0, 0, 0));
    TORCH_CHECK_VALUE(
        index >= 0 && index < static_cast<double>(batch) &&
            index == std::floor(index),
        kOp,
        ": the batch index of box ",
        roi,
        " must be an integer from 0 to ",
        batch - 1,
        ", got ",
        index);
  }
}

} // namespace

RoiPoolShape check_roi_pool(
    const RoiPoolArguments& arguments,
    bool checks_batch_indices) {
  const auto& input = arguments.input;
  const auto& boxes = arguments.boxes;
  check_float_tensor(kOp, "input", input, 4, "(N, C, H, W)");
  check_float_tensor(kOp, "boxes", boxes, 2, "(K, 5)");
  check_same_device(kOp, "boxes", boxes, input);
  TORCH_CHECK_VALUE(
      boxes.size(1) == 5,
      kOp,
      ": boxes must have five columns (batch index, x1, y1, x2, y2), got "
      "shape ",
      boxes.sizes());
  RoiPoolShape shape{};
  shape.mode = check_mode(arguments.mode);
  check_numbers(arguments);
  shape.map = check_pair(kOp, "the input size", input.sizes().slice(2), 1);
  shape.bins = check_pair(kOp, "output_size", arguments.output_size, 1);
  shape.parts = check_pair(kOp, "part_size", arguments.part_size, 1);
  shape.groups = check_pair(kOp, "group_size", arguments.group_size, 1);
  shape.rois = boxes.size(0);
  shape.batch = input.size(0);
  TORCH_CHECK_VALUE(
      input.size(1) > 0 && input.size(1) % shape.groups.count() == 0,
      kOp,
      ": the input's channels must be a positive multiple of the groups, ",
      shape.groups.h,
      " * ",
      shape.groups.w,
      ", got ",
      input.size(1));
  shape.channels = input.size(1) / shape.groups.count();
  shape.classes = 1;
  shape.sampling_ratio = arguments.sampling_ratio;
  shape.spatial_scale = arguments.spatial_scale;
  shape.gamma = arguments.gamma;
  if (arguments.offset) {
    check_float_tensor(
        kOp, "offset", *arguments.offset, 4, "(K, 2*classes, parts, parts)");
    check_same_device(kOp, "offset", *arguments.offset, input);
    check_offset(*arguments.offset, shape);
  }
  if (checks_batch_indices) {
    check_batch_indices(boxes, shape.batch);
  }
  return shape;
}

void check_roi_grad_output(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const RoiPoolShape& shape) {
  constexpr const char* op = "_deform_roi_pool_backward";
  check_float_tensor(op, "grad_output", grad_output, 4, "(K, C, P, P)");
  check_same_dtype(op, "grad_output", grad_output, input);
  check_same_device(op, "grad_output", grad_output, input);
  const std::array<int64_t, 4> expected{
      shape.rois, shape.channels, shape.bins.h, shape.bins.w};
  TORCH_CHECK_VALUE(
      grad_output.sizes() == at::IntArrayRef(expected),
      op,
      ": grad_output must have the shape of the output, ",
      at::IntArrayRef(expected),
      ", got ",
      grad_output.sizes());
}

at::Tensor allocate_roi_pool_output(
    const at::Tensor& input,
    const RoiPoolShape& shape) {
  return at::empty(
      {shape.rois, shape.channels, shape.bins.h, shape.bins.w},
      input.options().memory_format(memory_format_of(input)));
}

RoiPoolGradients allocate_roi_pool_gradients(
    const RoiPoolArguments& arguments,
    std::array<bool, 2> output_mask) {
  return {
      allocate_gradient(arguments.input, output_mask[0]),
      arguments.offset ? allocate_gradient(*arguments.offset, output_mask[1])
                       : at::empty({0}, arguments.boxes.options())};
}

} // namespace dcn
