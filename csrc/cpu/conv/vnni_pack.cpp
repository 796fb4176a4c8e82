// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "cpu/conv/vnni_pack.h"

#include "cpu/conv/rounding.h"

namespace dcn::cpu {
namespace {

// The upper row may be null: zeros.
DCN_INLINE void pack_vnni_rows(
    const float* lower,
    const float* upper,
    int64_t width,
    c10::BFloat16* pairs) {
  if (upper == nullptr) {
    for (int64_t i = 0; i < width; ++i) {
      pairs[2 * i] = round_to<c10::BFloat16>(lower[i]);
      pairs[2 * i + 1] = c10::BFloat16(0.0f);
    }
  } else {
    for (int64_t i = 0; i < width; ++i) {
      pairs[2 * i] = round_to<c10::BFloat16>(lower[i]);
      pairs[2 * i + 1] = round_to<c10::BFloat16>(upper[i]);
    }
  }
}

} // namespace

DCN_VECTOR_CLONES void pack_vnni(
    const float* rows,
    int64_t count,
    int64_t width,
    c10::BFloat16* pairs) {
  for (int64_t row = 0; row < count; row += 2) {
    const float* lower = rows + row * width;
    pack_vnni_rows(
        lower,
        row + 1 < count ? lower + width : nullptr,
        width,
        pairs + row * width);
  }
}

} // namespace dcn::cpu
