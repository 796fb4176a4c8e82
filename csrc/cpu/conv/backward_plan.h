// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include "ops/slice_cut.h"

namespace dcn::cpu {

// How a backward pass is cut into tasks (image, tile of output positions, slice
// of input channels), whatever the number of threads.
struct BackwardTiling {
  ConvChannelTiling channels;
  int64_t tile; // output positions of one task
  int64_t tiles; // per image
  int64_t block; // output positions whose columns are made at once
  int64_t workspace_bytes; // workspace of a task

  int64_t images; // whose tasks run together

  // `grad_bytes`: of the copies of grad_output, per position of an image.
  BackwardTiling(
      const BackwardInputs& inputs,
      bool wants_input,
      bool sums_in_dtype,
      int64_t element_bytes,
      int64_t grad_bytes);

  int64_t slices() const {
    return static_cast<int64_t>(channels.slices.size());
  }
};

} // namespace dcn::cpu
