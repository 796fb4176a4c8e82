// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include <cstdint>

namespace dcn::cpu {

// to[column * to_stride + row] = from[row * from_stride + column], converted to
// the dtype of `to`; with kAdd, adds it. Adds bias[column] first unless `bias`
// is null.
template <typename From, typename To, bool kAdd, typename T>
void transpose(
    const From* from,
    int64_t from_stride,
    int64_t rows,
    int64_t columns,
    const T* bias,
    To* to,
    int64_t to_stride);

} // namespace dcn::cpu
