// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "ops/backward_tiling.h"

namespace dcn {
namespace {

bool is_channels_last(const at::Tensor& tensor) {
  return memory_format_of(tensor) == at::MemoryFormat::ChannelsLast;
}

} // namespace

ConvChannelTiling::ConvChannelTiling(
    const BackwardInputs& inputs,
    bool wants_input,
    bool accumulates_in_dtype,
    bool reads_dtype,
    const ChannelTilingLimits& limits)
    : ChannelTiling(
          int64_t{inputs.shape.geometry.in_h} * inputs.shape.geometry.in_w,
          inputs.shape.in_channels,
          !(is_channels_last(inputs.input) && reads_dtype),
          wants_input &&
              !(is_channels_last(inputs.input) && accumulates_in_dtype),
          accumulates_in_dtype,
          limits),
      slices(inputs.shape.slices(slice_channels)) {}

} // namespace dcn
