// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Memory budgets of the CUDA kernels.
#pragma once

#include <cstdint>

namespace dcn::cuda {

// Columns of one im2col tile: what stays in the L2 cache of a large GPU.
constexpr int64_t kColumnBytes = int64_t{32} << 20;
// Channels-last copies of inputs and of accumulators of their gradients.
constexpr int64_t kCopyBytes = int64_t{96} << 20;

} // namespace dcn::cuda
