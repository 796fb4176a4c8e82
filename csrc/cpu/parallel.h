// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include <algorithm>

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace dcn::cpu {

// Calls body(begin, end) on disjoint ranges that cover [0, tasks), on all of
// PyTorch's threads.
//
// Always in a parallel region when there is more than one thread, even for one
// task: the GEMM library then stays on one thread, so that a task gives the
// same bits whatever the number of threads.
template <typename Body>
void parallel_tasks(int64_t tasks, const Body& body) {
  if (tasks == 0) {
    return;
  }
  at::parallel_for(
      0, std::max<int64_t>(tasks, 2), 1, [&](int64_t begin, int64_t end) {
        // Worker threads start with every dispatch key on; what runs in them is
        // below autograd and autocast.
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        c10::impl::ExcludeDispatchKeyGuard below_autocast(
            c10::autocast_dispatch_keyset);
        end = std::min(end, tasks);
        if (begin < end) {
          body(begin, end);
        }
      });
}

} // namespace dcn::cpu
