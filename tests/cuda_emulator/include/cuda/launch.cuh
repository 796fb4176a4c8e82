// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Replaces csrc/cuda/launch.cuh: launches run in the emulator, and the kernels
// serve CPU tensors.

#pragma once

#include <algorithm>

#include "emulator.h"

#define DCN_CUDA_DISPATCH_KEY CPU

namespace dcn::cuda {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = int64_t{1} << 16;

template <typename Params>
void launch(void (*kernel)(Params), const Params& params, int64_t threads) {
  if (threads == 0) {
    return;
  }
  const int64_t blocks =
      std::min(kMaxBlocks, (threads + kThreads - 1) / kThreads);
  cuda_emulator::run(
      reinterpret_cast<const void*>(kernel), blocks, kThreads, [&] {
        kernel(params);
      });
}

} // namespace dcn::cuda
