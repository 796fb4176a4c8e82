// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include <c10/util/BFloat16.h>

#include "math/macros.h"

namespace dcn::cpu {

// Converts to C, rounding half to even. For bfloat16 without the branch of
// c10's conversion, so that loops over it are vectorized; NaN stays NaN.
template <typename C, typename T>
DCN_INLINE C round_to(T value) {
  if constexpr (std::is_same_v<C, c10::BFloat16>) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t nan = (bits >> 16) | 0x40u;
    return C(
        static_cast<uint16_t>(value == value ? rounded : nan), C::from_bits());
  } else {
    return static_cast<C>(value);
  }
}

} // namespace dcn::cpu
