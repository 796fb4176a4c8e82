// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include <vector>

#include "ops/copy_plan.h"
#include "ops/deform_conv2d.h"

namespace dcn {

// Slices of input channels, and the copies made for each.
struct ConvChannelTiling : ChannelTiling {
  std::vector<ChannelSlice> slices;

  ConvChannelTiling(
      const BackwardInputs& inputs,
      bool wants_input,
      bool sums_in_dtype, // the input's dtype is that of the sums
      bool reads_dtype, // the input is read in its own dtype
      const ChannelTilingLimits& limits);
};

} // namespace dcn
