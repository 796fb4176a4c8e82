// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "ops/slice_cut.h"

#include <algorithm>

#include "ops/checks.h"

namespace dcn {

SliceCut::SliceCut(
    const BackwardInputs& inputs,
    bool wants_input,
    bool sums_in_dtype,
    bool reads_dtype,
    const CopyLimits& limits) {
  const auto& shape = inputs.shape;
  const int64_t pixels = int64_t{shape.geometry.in_h} * shape.geometry.in_w;
  const bool channels_last =
      memory_format_of(inputs.input) == at::MemoryFormat::ChannelsLast;
  copies_input = !(channels_last && reads_dtype);
  copies_grad = wants_input && !(channels_last && sums_in_dtype);
  const auto bytes_of = [&](int64_t channels) {
    return pixels * channels *
        (copies_input * limits.input_bytes + copies_grad * limits.grad_bytes);
  };
  widest = std::min(limits.widest, shape.in_channels);
  while (widest / 2 >= limits.narrowest && bytes_of(widest) > limits.bytes) {
    widest /= 2;
  }
  if (bytes_of(widest) > limits.bytes) {
    // A map so large is read, and its gradient written, where it is. In half
    // precision the sums of grad_input need float32: one plane at a time.
    copies_input = false;
    copies_grad = wants_input && !sums_in_dtype;
    widest = copies_grad ? 1 : std::min(limits.widest, shape.in_channels);
  }
  slices = shape.slices(widest);
  image_bytes = bytes_of(widest);
}

} // namespace dcn
