// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include <algorithm>
#include <cstdint>

namespace dcn {

// Channels-last copies that a backward pass may make.
struct ChannelTilingLimits {
  int64_t widest; // channels of a slice, at most
  int64_t narrowest; // rather read in place than copy slices below this
  int64_t bytes; // of one image's copies
  int64_t input_bytes; // of an element of the copied input
  int64_t grad_bytes; // of an element of the gradient's sums
};

// How many channels are worked on at once, and which of the input and its
// gradient are copied to channels-last for them. Follows from shapes, formats
// and dtypes alone, never from the number of threads: it decides the order of
// every sum.
struct ChannelTiling {
  int64_t widest;
  bool copies_input;
  bool copies_grad;
  int64_t image_bytes; // of the copies of one image and the widest slice

  ChannelTiling(
      int64_t pixels,
      int64_t channels,
      bool wants_input_copy,
      bool wants_grad_copy,
      bool sums_in_dtype, // the input's dtype is that of the sums
      const ChannelTilingLimits& limits)
      : widest(std::min(limits.widest, channels)),
        copies_input(wants_input_copy),
        copies_grad(wants_grad_copy) {
    const auto bytes_of = [&](int64_t width) {
      return pixels * width *
          (copies_input * limits.input_bytes + copies_grad * limits.grad_bytes);
    };
    while (widest / 2 >= limits.narrowest && bytes_of(widest) > limits.bytes) {
      widest /= 2;
    }
    if (bytes_of(widest) > limits.bytes) {
      // A map so large is read, and its gradient written, where it is. In half
      // precision the sums of its gradient need float32: one plane at a time.
      copies_input = false;
      copies_grad = copies_grad && !sums_in_dtype;
      widest = copies_grad ? 1 : std::min(limits.widest, channels);
    }
    image_bytes = bytes_of(widest);
  }
};

} // namespace dcn
