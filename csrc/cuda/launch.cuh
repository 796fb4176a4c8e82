// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// The only place where kernels are launched. The emulator (tests/cuda_emulator)
// replaces this file.
#pragma once

#include <algorithm>

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>

// The key of the dispatcher that the kernels are registered under.
#define DCN_CUDA_DISPATCH_KEY CUDA

namespace dcn::cuda {

constexpr int kThreads = 256;
// Enough blocks to fill any GPU several times; grid-stride loops do the rest.
constexpr int64_t kMaxBlocks = int64_t{1} << 16;

// Launches kernel(params) on the current stream with at least `threads`
// threads, up to the limits above.
template <typename Params>
void launch(void (*kernel)(Params), const Params& params, int64_t threads) {
  if (threads == 0) {
    return;
  }
  const int64_t blocks =
      std::min(kMaxBlocks, (threads + kThreads - 1) / kThreads);
  kernel<<<
      static_cast<unsigned>(blocks),
      kThreads,
      0,
      at::cuda::getCurrentCUDAStream()>>>(params);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

} // namespace dcn::cuda
