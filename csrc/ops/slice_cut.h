// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include <vector>

#include "ops/deform_conv2d.h"

namespace dcn {

// What the gradients of one call are computed from.
struct BackwardInputs {
  const DeformConvShape& shape;
  const at::Tensor& grad_output;
  const at::Tensor& input;
  const at::Tensor& offset;
  const OptionalTensor& mask;
};

// Channels-last copies that a backward pass may make.
struct CopyLimits {
  int64_t widest; // channels of a slice, at most
  int64_t narrowest; // rather read in place than copy slices below this
  int64_t bytes; // of one image's copies
  int64_t input_bytes; // of an element of the copied input
  int64_t grad_bytes; // of an element of the gradient's sums
};

// Slices of input channels, and which of the input and its gradient are copied
// to channels-last for each. Follows from shapes, formats and dtypes alone,
// never from the number of threads: the cut decides the order of every sum.
struct SliceCut {
  std::vector<ChannelSlice> slices;
  int64_t widest;
  bool copies_input;
  bool copies_grad;
  int64_t image_bytes; // of the copies of one image and the widest slice

  SliceCut(
      const BackwardInputs& inputs,
      bool wants_input,
      bool sums_in_dtype, // the input's dtype is that of the sums
      bool reads_dtype, // the input is read in its own dtype
      const CopyLimits& limits);
};

} // namespace dcn
