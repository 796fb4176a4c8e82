// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Checks and counts the memory accesses of kernels.
//
// An allocator of our own records every CPU tensor, so that accesses outside of
// tensors are found, and fills new memory with a NaN that nothing else writes,
// so that reads of what was never written are found. In the checked build the
// compiler calls __tsan_read4(address) and the like at each access, as it would
// for ThreadSanitizer; its runtime is not linked, since the functions are
// defined here. Each allocation has a shadow: for every two bytes, which
// threads of the current launch accessed them. Threads of a launch never
// synchronise in our kernels (a shuffle does not order memory), so two threads
// that access the same bytes, one of them writing, race, unless both use
// atomics.

#include "emulator.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <vector>

#include <sys/mman.h>

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

namespace cuda_emulator {
namespace {

constexpr size_t kAlignment = 64;
// Space between allocations, so that accesses past an end do not hit the next.
constexpr size_t kGap = 256;
// Larger allocations are not filled, so that only what is touched takes memory.
constexpr size_t kHugeBytes = size_t{1} << 30;
// As float16, bfloat16, float32 and float64: a NaN that no computation gives.
// Half of a float64 may hold it.
constexpr uint16_t kUninitialized = 0xffe9;
constexpr size_t kCellBytes = 2;
constexpr uint32_t kSeveral = 0xffffffff;

#ifdef DCN_EMULATOR_CHECKED
constexpr bool kChecked = true;
#else
constexpr bool kChecked = false;
#endif

enum class Access { kRead, kWrite, kAtomic };
constexpr const char* kAccessNames[] = {"read", "write", "atomic"};

// Who accessed two bytes in a launch; 0: nobody. Several threads may read them,
// or add atomically.
struct Cell {
  uint32_t launch = 0;
  uint32_t reader = 0;
  uint32_t writer = 0;
  uint32_t adder = 0;
};

struct Allocation {
  const char* begin;
  size_t bytes;
  std::unique_ptr<Cell[]> cells; // created at the first access by a kernel
};

// Bytes that a kernel accessed: all, and each byte once per launch.
struct Traffic {
  int64_t launches = 0;
  int64_t requested[3] = {};
  int64_t unique[3] = {};
};

// Leaked: tensors may outlive the static objects.
auto& allocations = *new std::map<const char*, Allocation>;
auto& allocations_mutex = *new std::mutex;
std::atomic<int64_t> bytes_now{0}, bytes_peak{0};
auto& traffic = *new std::map<const void*, Traffic>;
thread_local Traffic* kernel_traffic = nullptr;
thread_local size_t kernel_value_bytes = 0;
thread_local Allocation* last_allocation = nullptr;
thread_local uint64_t last_version = 0;
std::atomic<uint64_t> version{0}; // changes with the allocations

void release(void* pointer) {
  if (pointer == nullptr) {
    return;
  }
  size_t bytes = 0;
  {
    const std::lock_guard<std::mutex> lock(allocations_mutex);
    const auto found = allocations.find(static_cast<char*>(pointer));
    bytes = found->second.bytes;
    allocations.erase(found);
    ++version;
  }
  bytes_now -= bytes;
  if (bytes >= kHugeBytes) {
    munmap(pointer, bytes + kGap);
  } else {
    std::free(pointer);
  }
}

class RecordingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* pointer = nullptr;
    if (bytes > 0) {
      pointer = reserve(bytes);
      const std::lock_guard<std::mutex> lock(allocations_mutex);
      const char* begin = static_cast<const char*>(pointer);
      allocations.emplace(begin, Allocation{begin, bytes, nullptr});
      ++version;
      bytes_now += bytes;
      bytes_peak = std::max<int64_t>(bytes_peak, bytes_now);
    }
    return {pointer, pointer, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return &release;
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  static void* reserve(size_t bytes) {
    void* pointer = nullptr;
    if (bytes >= kHugeBytes) {
      pointer = mmap(
          nullptr,
          bytes + kGap,
          PROT_READ | PROT_WRITE,
          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
          -1,
          0);
      TORCH_CHECK(pointer != MAP_FAILED, "cuda_emulator: out of memory");
      return pointer;
    }
    const int error = posix_memalign(&pointer, kAlignment, bytes + kGap);
    TORCH_CHECK(error == 0, "cuda_emulator: out of memory");
    if (kChecked) {
      std::fill_n(
          static_cast<uint16_t*>(pointer), (bytes + 1) / 2, kUninitialized);
    }
    return pointer;
  }
};

// The allocation that contains `address`, or the last one before it, or null.
Allocation* allocation_at(const char* address) {
  if (last_version == version && last_allocation != nullptr &&
      address >= last_allocation->begin &&
      address < last_allocation->begin + last_allocation->bytes) {
    return last_allocation;
  }
  const std::lock_guard<std::mutex> lock(allocations_mutex);
  auto found = allocations.upper_bound(address);
  if (found == allocations.begin()) {
    return nullptr;
  }
  last_allocation = &std::prev(found)->second;
  last_version = version;
  return last_allocation;
}

[[noreturn]] void fail_at(
    const std::string& fault,
    Access access,
    size_t bytes,
    const Allocation* allocation,
    const char* address) {
  std::ostringstream details;
  details << kAccessNames[static_cast<int>(access)] << " of " << bytes
          << " bytes";
  if (allocation != nullptr) {
    details << " at byte " << address - allocation->begin
            << " of an allocation of " << allocation->bytes;
  } else {
    details << " at " << static_cast<const void*>(address);
  }
  fail(fault, details.str());
}

// Whether a whole element of the access was never written. Longer accesses than
// 8 bytes are vectors; of 16-bit values, two at a time are looked at.
bool reads_uninitialized(const char* address, size_t bytes) {
  const size_t element =
      bytes <= 8 ? bytes : std::max<size_t>(kernel_value_bytes, 4);
  for (size_t i = 0; i + element <= bytes; i += element) {
    size_t same = 0;
    for (; same < element; same += kCellBytes) {
      uint16_t value;
      std::memcpy(&value, address + i + same, sizeof(value));
      if (value != kUninitialized) {
        break;
      }
    }
    if (same >= element) {
      return true;
    }
  }
  return false;
}

bool others(uint32_t threads) {
  return threads != 0 && threads != current_thread;
}

void add_thread(uint32_t& threads) {
  threads = others(threads) ? kSeveral : current_thread;
}

// Records the access in the shadow; returns the name of a race, or null.
const char* record(Cell& cell, Access access) {
  if (cell.launch != current_launch) {
    cell = Cell{current_launch, 0, 0, 0};
  }
  const char* race = nullptr;
  uint32_t* threads = nullptr;
  switch (access) {
    case Access::kRead:
      threads = &cell.reader;
      race = others(cell.writer) ? "race between a read and a write" : race;
      race = others(cell.adder) ? "race between a read and an atomic" : race;
      break;
    case Access::kWrite:
      threads = &cell.writer;
      race = others(cell.writer) ? "race between two writes" : race;
      race = others(cell.reader) ? "race between a read and a write" : race;
      race = others(cell.adder) ? "race between a write and an atomic" : race;
      break;
    case Access::kAtomic:
      threads = &cell.adder;
      race = others(cell.writer) ? "race between a write and an atomic" : race;
      race = others(cell.reader) ? "race between a read and an atomic" : race;
      break;
  }
  if (*threads == 0) {
    kernel_traffic->unique[static_cast<int>(access)] += kCellBytes;
  }
  add_thread(*threads);
  return race;
}

void check(const void* pointer, size_t bytes, Access access, bool is_aligned) {
  const char* address = static_cast<const char*>(pointer);
  Allocation* allocation = allocation_at(address);
  if (allocation == nullptr ||
      address + bytes > allocation->begin + allocation->bytes) {
    if (is_private(pointer)) {
      return;
    }
    fail_at("access out of bounds", access, bytes, allocation, address);
  }
  // Elements of vectors of atomic additions are aligned one by one.
  if (is_aligned && reinterpret_cast<uintptr_t>(pointer) % bytes != 0) {
    fail_at("misaligned access", access, bytes, allocation, address);
  }
  if (!kChecked) {
    return;
  }
  if (access != Access::kWrite && reads_uninitialized(address, bytes)) {
    fail_at("read of uninitialised memory", access, bytes, allocation, address);
  }
  kernel_traffic->requested[static_cast<int>(access)] += bytes;
  if (allocation->bytes >= kHugeBytes) {
    return; // its shadow would be larger than the memory of the machine
  }
  if (!allocation->cells) {
    const size_t cells = (allocation->bytes + kCellBytes - 1) / kCellBytes;
    allocation->cells = std::make_unique<Cell[]>(cells);
  }
  const size_t first = (address - allocation->begin) / kCellBytes;
  const size_t last = (address + bytes - 1 - allocation->begin) / kCellBytes;
  for (size_t i = first; i <= last; ++i) {
    if (const char* race = record(allocation->cells[i], access)) {
      fail_at(race, access, bytes, allocation, address);
    }
  }
}

RecordingAllocator recording_allocator;

// Replaces PyTorch's allocator of CPU tensors when the library is loaded.
const bool registered = [] {
  c10::SetCPUAllocator(&recording_allocator, /*priority=*/1);
  return true;
}();

} // namespace

void begin_memory_checks(const void* kernel, size_t value_bytes) {
  const std::lock_guard<std::mutex> lock(allocations_mutex);
  kernel_value_bytes = value_bytes;
  kernel_traffic = &traffic[kernel];
  ++kernel_traffic->launches;
}

void atomic_access(const void* address, size_t bytes) {
  count_atomic();
  check(address, bytes, Access::kAtomic, true);
}

} // namespace cuda_emulator

using cuda_emulator::Access;

// Instrumented code calls these in host functions too: current_thread is 0.
#define DCN_EMULATOR_ACCESS(NAME, BYTES, KIND, IS_ALIGNED)            \
  extern "C" void __tsan_##NAME(void* address) {                      \
    if (cuda_emulator::current_thread != 0) {                         \
      cuda_emulator::check(address, BYTES, Access::KIND, IS_ALIGNED); \
    }                                                                 \
  }
#define DCN_EMULATOR_ACCESSES(BYTES)                              \
  DCN_EMULATOR_ACCESS(read##BYTES, BYTES, kRead, true)            \
  DCN_EMULATOR_ACCESS(write##BYTES, BYTES, kWrite, true)          \
  DCN_EMULATOR_ACCESS(unaligned_read##BYTES, BYTES, kRead, false) \
  DCN_EMULATOR_ACCESS(unaligned_write##BYTES, BYTES, kWrite, false)
DCN_EMULATOR_ACCESSES(1)
DCN_EMULATOR_ACCESSES(2)
DCN_EMULATOR_ACCESSES(4)
DCN_EMULATOR_ACCESSES(8)
DCN_EMULATOR_ACCESSES(16)

extern "C" {

void __tsan_read_range(void* address, size_t bytes) {
  if (cuda_emulator::current_thread != 0 && bytes > 0) {
    cuda_emulator::check(address, bytes, Access::kRead, false);
  }
}
void __tsan_write_range(void* address, size_t bytes) {
  if (cuda_emulator::current_thread != 0 && bytes > 0) {
    cuda_emulator::check(address, bytes, Access::kWrite, false);
  }
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

} // extern "C"

// Atomics of host functions, such as the reference counts of tensors. (Kernels
// call atomicAdd.)
#define DCN_EMULATOR_FETCH(BITS, T, OPERATION)                 \
  extern "C" T __tsan_atomic##BITS##_fetch_##OPERATION(        \
      volatile T* p, T v, int) {                               \
    return __atomic_fetch_##OPERATION(p, v, __ATOMIC_SEQ_CST); \
  }
#define DCN_EMULATOR_EXCHANGE(BITS, T, STRENGTH)                    \
  extern "C" int __tsan_atomic##BITS##_compare_exchange_##STRENGTH( \
      volatile T* p, T* expected, T v, int, int) {                  \
    return __atomic_compare_exchange_n(                             \
        p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }
#define DCN_EMULATOR_ATOMICS(BITS, T)                                    \
  extern "C" T __tsan_atomic##BITS##_load(const volatile T* p, int) {    \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                         \
  }                                                                      \
  extern "C" void __tsan_atomic##BITS##_store(volatile T* p, T v, int) { \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                            \
  }                                                                      \
  extern "C" T __tsan_atomic##BITS##_exchange(volatile T* p, T v, int) { \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                  \
  }                                                                      \
  DCN_EMULATOR_FETCH(BITS, T, add)                                       \
  DCN_EMULATOR_FETCH(BITS, T, sub)                                       \
  DCN_EMULATOR_FETCH(BITS, T, and)                                       \
  DCN_EMULATOR_FETCH(BITS, T, or)                                        \
  DCN_EMULATOR_FETCH(BITS, T, xor)                                       \
  DCN_EMULATOR_EXCHANGE(BITS, T, strong)                                 \
  DCN_EMULATOR_EXCHANGE(BITS, T, weak)
DCN_EMULATOR_ATOMICS(8, unsigned char)
DCN_EMULATOR_ATOMICS(16, unsigned short)
DCN_EMULATOR_ATOMICS(32, unsigned int)
DCN_EMULATOR_ATOMICS(64, unsigned long)
extern "C" void __tsan_atomic_thread_fence(int) {}

// The interface to Python (library.py).
extern "C" {

int dcn_emulator_is_checked() {
  return cuda_emulator::kChecked;
}

// Restarts the measurement of the peak; returns the bytes allocated now.
int64_t dcn_emulator_reset_peak() {
  return cuda_emulator::bytes_peak = cuda_emulator::bytes_now.load();
}

int64_t dcn_emulator_peak() {
  return cuda_emulator::bytes_peak;
}

// Writes the number of launches of a kernel, the bytes that it requested and
// the unique bytes, each as read, written and added atomically.
void dcn_emulator_traffic(const void* kernel, int64_t* out) {
  const auto found = cuda_emulator::traffic.find(kernel);
  const cuda_emulator::Traffic traffic = found == cuda_emulator::traffic.end()
      ? cuda_emulator::Traffic{}
      : found->second;
  out[0] = traffic.launches;
  std::copy_n(traffic.requested, 3, out + 1);
  std::copy_n(traffic.unique, 3, out + 4);
}

} // extern "C"
