// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include <cstdint>

#include <c10/util/BFloat16.h>

namespace dcn::cpu {

// Rounds (count, width) to bfloat16 with its rows in pairs (see Packing); an
// odd last row is paired with zeros.
void pack_vnni(
    const float* rows,
    int64_t count,
    int64_t width,
    c10::BFloat16* pairs);

} // namespace dcn::cpu
