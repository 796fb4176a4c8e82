// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include <cstdint>

namespace dcn::cpu {

// Element (row, column) of `values` plus bias[column], if there is a bias, goes
// to to[row * row_step + column * column_step], as S.
template <typename S, typename T>
void store_epilogue(
    const T* values,
    int64_t stride,
    const T* bias,
    int64_t rows,
    int64_t columns,
    S* to,
    int64_t row_step,
    int64_t column_step);

} // namespace dcn::cpu
