// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include <algorithm>

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace dcn::cpu {

// Calls body(begin, end) on disjoint ranges that cover [0, tasks), on PyTorch's
// intra-op threads.
//
// With more than one thread this is always a parallel region, even for a single
// task: then the GEMM library uses one thread inside it, and a task gives the
// same bits for any number of threads.
template <typename Body>
void parallel_tasks(int64_t tasks, const Body& body) {
  if (tasks == 0) {
    return;
  }
  at::parallel_for(
      0, std::max<int64_t>(tasks, 2), 1, [&](int64_t begin, int64_t end) {
        // Worker threads start with all dispatch keys enabled. Tasks run below
        // autograd and autocast.
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        c10::impl::ExcludeDispatchKeyGuard below_autocast(
            c10::autocast_dispatch_keyset);
        end = std::min(end, tasks);
        if (begin < end) {
          body(begin, end);
        }
      });
}

// Calls body(begin, end) on disjoint ranges that cover [0, items), each of
// about `size` additions: on the calling thread if there are too few of them
// for a parallel region.
template <typename Body>
void parallel_items(int64_t items, int64_t size, const Body& body) {
  constexpr int64_t kGrain = 1 << 15;
  at::parallel_for(
      0,
      items,
      std::max<int64_t>(kGrain / std::max<int64_t>(size, 1), 1),
      body);
}

} // namespace dcn::cpu
