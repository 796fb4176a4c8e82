// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Replaces csrc/cuda/launch.cuh: launches run in the emulator, and the kernels
// serve CPU tensors.

#pragma once

#include "cuda/grid.cuh"
#include "emulator.h"

#define DCN_CUDA_DISPATCH_KEY CPU

namespace dcn::cuda {

template <typename Params>
void launch(void (*kernel)(Params), const Params& params, int64_t threads) {
  if (threads == 0) {
    return;
  }
  cuda_emulator::run(
      reinterpret_cast<const void*>(kernel),
      num_blocks(threads),
      kThreads,
      [&] { kernel(params); });
}

} // namespace dcn::cuda
