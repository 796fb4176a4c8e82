// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// The grid of all launches.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dcn::cuda {

constexpr int kThreads = 256;
// Enough blocks to fill any GPU several times; grid-stride loops do the rest.
constexpr int64_t kMaxBlocks = int64_t{1} << 16;

// Blocks for at least `threads` threads, up to the limit above.
inline int64_t num_blocks(int64_t threads) {
  return std::min(kMaxBlocks, (threads + kThreads - 1) / kThreads);
}

} // namespace dcn::cuda
