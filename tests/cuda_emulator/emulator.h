// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Runs CUDA kernels on the CPU. A warp is 32 coroutines that meet at shuffles;
// warps, and the lanes of a warp, run in random order, one at a time.
//
// In the checked build, the compiler calls a function at each memory access of
// the kernels (memory.cpp), which looks for accesses out of bounds, misaligned
// ones, reads of uninitialised memory, and races in global memory. What it
// misses is in docs/cuda.md.

#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace cuda_emulator {

// The built-in variables of kernels.
struct Index {
  unsigned x = 0;
};
struct BuiltIns {
  Index threadIdx, blockIdx, blockDim, gridDim;
};
extern thread_local BuiltIns built_ins;

// Runs all threads of a launch. `kernel` is the address of the kernel, for the
// report; `value_bytes` is the size of the elements of its vectors. Throws
// c10::Error where a GPU would fail, or the result could differ between runs.
void run(
    const void* kernel,
    size_t value_bytes,
    int64_t blocks,
    int threads,
    const std::function<void()>& thread);

// Returns the `value` of the lane whose number differs from that of this lane
// by `distance` (exclusive or). `line` identifies the shuffle in its source.
uint64_t shuffle_xor(unsigned mask, uint64_t value, int distance, int line);

// Called before an atomic operation on `size` bytes.
void atomic_access(const void* address, size_t size);

// Whether the copy of the sources with deliberate faults has this one now.
bool is_selected(const char* fault);

// What the scheduler (scheduler.cpp) and the memory checker share.

// Ends the launch; called by a thread of a kernel.
[[noreturn]] void fail(const std::string& fault, const std::string& details);

// Number of the current launch, and of the running thread in it, from 1 on; 0
// outside of kernels.
extern thread_local uint32_t current_launch, current_thread;

// Whether `address` is that of a built-in variable, a local variable or a
// parameter: on the stack of a lane or of the host.
bool is_private(const void* address);

void count_atomic();

// Selects the kernel whose memory accesses are checked and counted.
void begin_memory_checks(const void* kernel, size_t value_bytes);

} // namespace cuda_emulator
