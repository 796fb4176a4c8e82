// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// The only place where kernels are launched. The emulator (tests/cuda_emulator)
// replaces this file.
#pragma once

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>

#include "cuda/grid.cuh"

// The key of the dispatcher that the kernels are registered under.
#define DCN_CUDA_DISPATCH_KEY CUDA

namespace dcn::cuda {

// Launches kernel(params) on the current stream with at least `threads`
// threads, up to the limit of the grid.
template <typename Params>
void launch(void (*kernel)(Params), const Params& params, int64_t threads) {
  if (threads == 0) {
    return;
  }
  kernel<<<
      static_cast<unsigned>(num_blocks(threads)),
      kThreads,
      0,
      at::cuda::getCurrentCUDAStream()>>>(params);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

} // namespace dcn::cuda
