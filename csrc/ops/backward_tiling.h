// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Backward tiling along channels, for both devices and both families of ops:
// how many channels a backward pass works on at once, and which of the input
// and its gradient it copies to channels-last for them. It follows from shapes,
// memory formats and dtypes only, never from the number of threads, since it
// decides the order of every sum.
//
// What the CPU tiles beside channels is in cpu/conv/backward_tiling.h
// (output positions) and cpu/roi/roi_pool_backward.cpp (RoIs).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "ops/deform_conv2d.h"

namespace dcn {

// Limits of the channels-last copies, set by each device.
struct ChannelTilingLimits {
  int64_t max_channels; // of a slice
  // Rather than copy slices narrower than this, the map is read in place.
  int64_t min_copied_channels;
  int64_t copy_bytes; // of one image and slice
  int64_t input_element_bytes; // of the copied input
  int64_t grad_element_bytes; // of the gradient's accumulator
  // Narrower slices of channels-last maps are copied.
  int64_t min_in_place_channels = 1;
};

struct ChannelTiling {
  int64_t slice_channels;
  bool copies_input;
  bool copies_grad;
  int64_t copy_bytes; // of the copies of one image and slice

  ChannelTiling(
      int64_t pixels,
      int64_t channels,
      bool wants_input_copy,
      bool wants_grad_copy,
      bool accumulates_in_dtype, // the input's dtype is the accumulator's
      const ChannelTilingLimits& limits)
      : slice_channels(std::min(limits.max_channels, channels)),
        copies_input(wants_input_copy),
        copies_grad(wants_grad_copy) {
    const auto bytes_of = [&](int64_t width) {
      return pixels * width *
          (copies_input * limits.input_element_bytes +
           copies_grad * limits.grad_element_bytes);
    };
    while (slice_channels / 2 >= limits.min_copied_channels &&
           bytes_of(slice_channels) > limits.copy_bytes) {
      slice_channels /= 2;
    }
    if (bytes_of(slice_channels) > limits.copy_bytes) {
      // So large a map is read, and its gradient written, in place. In half
      // precision the gradient still needs a float32 accumulator: one channel
      // at a time.
      copies_input = false;
      copies_grad = copies_grad && !accumulates_in_dtype;
      slice_channels =
          copies_grad ? 1 : std::min(limits.max_channels, channels);
    }
    copy_bytes = bytes_of(slice_channels);
  }
};

// The tiling of a deformable convolution. A slice never spans two convolution
// groups or two offset groups.
struct ConvChannelTiling : ChannelTiling {
  std::vector<ChannelSlice> slices;

  ConvChannelTiling(
      const BackwardInputs& inputs,
      bool wants_input,
      bool accumulates_in_dtype,
      bool reads_dtype, // the input is read in its dtype, without conversion
      const ChannelTilingLimits& limits);
};

} // namespace dcn
