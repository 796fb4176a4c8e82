// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Runs the threads of a launch: order, warps and shuffles.

#include "emulator.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <sstream>
#include <vector>

#include <pthread.h>
#include <sys/mman.h>

#include <c10/util/Exception.h>

namespace cuda_emulator {

thread_local BuiltIns built_ins;
thread_local uint32_t current_launch = 0, current_thread = 0;

namespace {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffff;
constexpr size_t kStackBytes = size_t{128} << 10;

struct Counts {
  int64_t launches = 0, threads = 0, shuffles = 0, atomics = 0;
};
Counts counts;
std::mutex counts_mutex;
// Of large grids only the first and the last warps, and as many in the middle,
// run; 0: all.
std::atomic<int64_t> warps_at_each_place{0};
std::map<const void*, std::string> kernel_names;
std::string selected_fault;

uint64_t seed() {
  static const uint64_t value = [] {
    const char* given = std::getenv("DCN_EMULATOR_SEED");
    return given ? std::strtoull(given, nullptr, 10)
                 : uint64_t{std::random_device()()};
  }();
  return value;
}

// Where a coroutine or the scheduler resumes: its stack pointer.
using Context = void*;

// Saves the registers that a call preserves, stores the context in *from, and
// continues at `to`. (ucontext and setjmp are ten times slower, which matters
// for tens of millions of shuffles.)
extern "C" void dcn_emulator_switch(Context* from, Context to);
#if defined(__x86_64__)
constexpr int kSavedRegisters = 6;
asm(R"(
.text
.local dcn_emulator_switch
.type dcn_emulator_switch, @function
dcn_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#else
#error "The CUDA emulator runs on x86-64 only"
#endif

// The context of a coroutine that starts with a call of `function`.
Context new_context(char* stack, size_t bytes, void (*function)()) {
  void** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr; // alignment: at its start a function has an odd stack
  *--top = reinterpret_cast<void*>(function); // the return address
  return std::fill_n(top - kSavedRegisters, kSavedRegisters, nullptr) -
      kSavedRegisters;
}

struct Shuffle {
  unsigned mask;
  uint64_t value;
  int distance;
  int line;
  int64_t number; // how many shuffles this lane reached before
};

enum class LaneState { kReady, kAtShuffle, kExited };

struct Lane {
  Context context;
  LaneState state;
  Shuffle shuffle;
  int64_t shuffles;
  uint64_t received;
};

// The coroutines of one warp, which run one warp after the other.
class Warp {
 public:
  Warp() : random_(seed()) {
    stacks_ = static_cast<char*>(mmap(
        nullptr,
        kWarp * kStackBytes,
        PROT_READ | PROT_WRITE,
        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
        -1,
        0));
    TORCH_CHECK(stacks_ != MAP_FAILED, "cuda_emulator: no memory for stacks");
    pthread_attr_t attributes;
    void* bottom = nullptr;
    size_t bytes = 0;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &bottom, &bytes);
    pthread_attr_destroy(&attributes);
    host_stack_ = static_cast<char*>(bottom);
    host_stack_bytes_ = bytes;
    create_lanes();
  }

  ~Warp() {
    munmap(stacks_, kWarp * kStackBytes);
  }

  void run_grid(
      const void* kernel,
      int64_t blocks,
      int threads,
      const std::function<void()>& thread) {
    thread_ = &thread;
    kernel_ = kernel;
    fault_.clear();
    counts_ = Counts{};
    counts_.launches = 1;
    built_ins.gridDim.x = blocks;
    built_ins.blockDim.x = threads;
    const int64_t warps_per_block = threads / kWarp;
    for (const int64_t warp : warp_order(blocks * warps_per_block)) {
      built_ins.blockIdx.x = warp / warps_per_block;
      run_warp(warp % warps_per_block * kWarp);
      if (!fault_.empty()) {
        create_lanes(); // the lanes are in the middle of a kernel
        break;
      }
    }
    current_thread = 0;
    const std::lock_guard<std::mutex> lock(counts_mutex);
    counts.launches += counts_.launches;
    counts.threads += counts_.threads;
    counts.shuffles += counts_.shuffles;
    counts.atomics += counts_.atomics;
  }

  const std::string& fault() const {
    return fault_;
  }

  uint64_t wait_at(const Shuffle& shuffle) {
    Lane& lane = lanes_[current_];
    ++counts_.shuffles;
    lane.shuffle = shuffle;
    lane.shuffle.number = lane.shuffles++;
    lane.state = LaneState::kAtShuffle;
    leave_lane();
    return lane.received;
  }

  void count_atomic() {
    ++counts_.atomics;
  }

  [[noreturn]] void fail(const std::string& fault, const std::string& details) {
    set_fault(fault, details);
    leave_lane();
    std::abort(); // a lane is not resumed after a fault
  }

  bool is_private(const void* address) const {
    const char* at = static_cast<const char*>(address);
    const char* variables = reinterpret_cast<const char*>(&built_ins);
    return (at >= variables && at < variables + sizeof(built_ins)) ||
        (at >= stacks_ && at < stacks_ + kWarp * kStackBytes) ||
        (at >= host_stack_ && at < host_stack_ + host_stack_bytes_);
  }

 private:
  static void lane_main();

  void create_lanes() {
    for (int i = 0; i < kWarp; ++i) {
      lanes_[i].context =
          new_context(stacks_ + i * kStackBytes, kStackBytes, lane_main);
    }
  }

  std::vector<int64_t> warp_order(int64_t warps) {
    std::vector<int64_t> order;
    const int64_t some = warps_at_each_place;
    if (some == 0 || warps <= 3 * some) {
      order.resize(warps);
      std::iota(order.begin(), order.end(), 0);
    } else {
      for (int64_t i = 0; i < some; ++i) {
        order.insert(order.end(), {i, (warps - some) / 2 + i, warps - 1 - i});
      }
    }
    std::shuffle(order.begin(), order.end(), random_);
    return order;
  }

  // Runs the next lane that is ready or, if there is none, completes the
  // shuffle; returns to the scheduler after a fault and at the end of the warp.
  // `from` is where to resume the caller.
  void run_next(Context& from) {
    while (fault_.empty()) {
      if (next_ == kWarp) {
        if (!exchange()) {
          break;
        }
        draw_lane_order();
      }
      const int lane = (order_factor_ * next_++ + order_offset_) % kWarp;
      if (lanes_[lane].state == LaneState::kReady) {
        enter_lane(from, lane);
        return;
      }
    }
    if (&from != &scheduler_) {
      dcn_emulator_switch(&from, scheduler_);
    }
  }

  void enter_lane(Context& from, int number) {
    current_ = number;
    built_ins.threadIdx.x = first_thread_ + number;
    current_thread =
        1 + built_ins.blockIdx.x * built_ins.blockDim.x + built_ins.threadIdx.x;
    const Context& to = lanes_[number].context;
    if (&to != &from) {
      dcn_emulator_switch(&from, to);
    }
  }

  void leave_lane() {
    run_next(lanes_[current_].context);
  }

  // An odd factor and an offset give a random order of the lanes.
  void draw_lane_order() {
    const uint64_t bits = random_();
    order_factor_ = (bits & (kWarp - 1)) | 1;
    order_offset_ = bits / kWarp % kWarp;
    next_ = 0;
  }

  void run_warp(unsigned first_thread) {
    counts_.threads += kWarp;
    first_thread_ = first_thread;
    for (Lane& lane : lanes_) {
      lane.state = LaneState::kReady;
      lane.shuffles = 0;
    }
    draw_lane_order();
    run_next(scheduler_);
  }

  // Completes a shuffle at which all lanes wait; returns false at the end of
  // the warp. All lanes have run as far as they can.
  bool exchange() {
    const auto is_waiting = [](const Lane& lane) {
      return lane.state == LaneState::kAtShuffle;
    };
    const Lane* first = std::find_if(lanes_, lanes_ + kWarp, is_waiting);
    if (first == lanes_ + kWarp) {
      return false;
    }
    current_ = first - lanes_;
    for (int i = 0; i < kWarp; ++i) {
      const Lane& lane = lanes_[i];
      const Shuffle& shuffle = lane.shuffle;
      if (!is_waiting(lane)) {
        set_fault(
            "shuffle mask names an exited lane",
            "line " + std::to_string(first->shuffle.line) + ", lane " +
                std::to_string(i));
        return false;
      }
      if (shuffle.line != first->shuffle.line ||
          shuffle.number != first->shuffle.number) {
        set_fault(
            "shuffle not reached by all lanes",
            "lane " + std::to_string(current_) + " waits at line " +
                std::to_string(first->shuffle.line) + ", lane " +
                std::to_string(i) + " at line " + std::to_string(shuffle.line));
        return false;
      }
      if (shuffle.mask != kFullMask) {
        set_fault(
            "shuffle mask leaves out a lane that takes part",
            "line " + std::to_string(shuffle.line));
        return false;
      }
    }
    for (int i = 0; i < kWarp; ++i) {
      lanes_[i].received =
          lanes_[(i ^ lanes_[i].shuffle.distance) % kWarp].shuffle.value;
      lanes_[i].state = LaneState::kReady;
    }
    return true;
  }

  void set_fault(const std::string& fault, const std::string& details) {
    std::ostringstream text;
    const auto name = kernel_names.find(kernel_);
    text << "cuda_emulator: " << fault << " (" << details << ") in "
         << (name == kernel_names.end() ? "a kernel" : name->second)
         << ", block " << built_ins.blockIdx.x << " of " << built_ins.gridDim.x
         << ", thread " << built_ins.threadIdx.x
         << "; DCN_EMULATOR_SEED=" << seed();
    fault_ = text.str();
  }

  std::mt19937_64 random_;
  char* stacks_;
  char* host_stack_;
  size_t host_stack_bytes_;
  Lane lanes_[kWarp];
  unsigned first_thread_ = 0;
  unsigned order_factor_ = 1, order_offset_ = 0, next_ = 0;
  int current_ = 0;
  Context scheduler_ = nullptr;
  const std::function<void()>* thread_ = nullptr;
  const void* kernel_ = nullptr;
  std::string fault_;
  Counts counts_;
};

thread_local std::unique_ptr<Warp> warp;

void Warp::lane_main() {
  for (;;) {
    (*warp->thread_)();
    warp->lanes_[warp->current_].state = LaneState::kExited;
    warp->leave_lane();
  }
}

} // namespace

void run(
    const void* kernel,
    size_t value_bytes,
    int64_t blocks,
    int threads,
    const std::function<void()>& thread) {
  static std::atomic<uint32_t> launches{0};
  if (!warp) {
    warp = std::make_unique<Warp>();
  }
  current_launch = ++launches;
  begin_memory_checks(kernel, value_bytes);
  warp->run_grid(kernel, blocks, threads, thread);
  TORCH_CHECK(warp->fault().empty(), warp->fault());
}

uint64_t shuffle_xor(unsigned mask, uint64_t value, int distance, int line) {
  return warp->wait_at({mask, value, distance, line, 0});
}

void count_atomic() {
  warp->count_atomic();
}

void fail(const std::string& fault, const std::string& details) {
  warp->fail(fault, details);
}

bool is_selected(const char* fault) {
  return selected_fault == fault;
}

bool is_private(const void* address) {
  return warp->is_private(address);
}

} // namespace cuda_emulator

// The interface to Python (library.py).
extern "C" {

// Writes the numbers of launches, threads, shuffles and atomics, and the seed.
void dcn_emulator_counts(int64_t* out) {
  using cuda_emulator::counts;
  const std::lock_guard<std::mutex> lock(cuda_emulator::counts_mutex);
  out[0] = counts.launches;
  out[1] = counts.threads;
  out[2] = counts.shuffles;
  out[3] = counts.atomics;
  out[4] = static_cast<int64_t>(cuda_emulator::seed());
}

void dcn_emulator_name_kernel(const void* kernel, const char* name) {
  cuda_emulator::kernel_names[kernel] = name;
}

void dcn_emulator_select_fault(const char* name) {
  cuda_emulator::selected_fault = name;
}

void dcn_emulator_run_few_warps(int64_t warps_at_each_place) {
  cuda_emulator::warps_at_each_place = warps_at_each_place;
}
}
