// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Replaces csrc/cuda/launch.cuh: launches run in the emulator, and the kernels
// serve CPU tensors.

#pragma once

#include "cuda/grid.cuh"
#include "emulator.h"

#define DCN_CUDA_DISPATCH_KEY CPU

namespace dcn::cuda {

// Bytes of the values of kernels with these parameters: of the first type.
template <typename Params>
constexpr size_t kValueBytes = 0;
template <template <typename...> class Params, typename S, typename... T>
constexpr size_t kValueBytes<Params<S, T...>> = sizeof(S);

template <typename Params>
void launch(void (*kernel)(Params), const Params& params, int64_t threads) {
  static_assert(kValueBytes<Params> > 0, "the parameters name no dtype");
  if (threads == 0) {
    return;
  }
  cuda_emulator::run(
      reinterpret_cast<const void*>(kernel),
      kValueBytes<Params>,
      num_blocks(threads),
      kThreads,
      [&] { kernel(params); });
}

} // namespace dcn::cuda
