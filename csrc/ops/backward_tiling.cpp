// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "ops/backward_tiling.h"

#include <algorithm>

namespace dcn {
namespace {

// Whether slices of the input are contiguous along channels, and wide enough to
// be read in place.
bool has_wide_slices(
    const BackwardInputs& inputs,
    const ChannelTilingLimits& limits) {
  const auto& shape = inputs.shape;
  const int64_t width =
      std::min(shape.group_in(), shape.channels_per_offset_group());
  return memory_format_of(inputs.input) == at::MemoryFormat::ChannelsLast &&
      (width >= limits.min_in_place_channels || width == shape.in_channels);
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
          !(has_wide_slices(inputs, limits) && reads_dtype),
          wants_input &&
              !(has_wide_slices(inputs, limits) && accumulates_in_dtype),
          accumulates_in_dtype,
          limits),
      slices(inputs.shape.slices(slice_channels)) {}

} // namespace dcn
