// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// The parts of the CUDA language that the kernels use, as C++ for a CPU.
// Included before every source, as nvcc does with the header of this name.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline

struct int4 {
  int x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

#define threadIdx cuda_emulator::built_ins.threadIdx
#define blockIdx cuda_emulator::built_ins.blockIdx
#define blockDim cuda_emulator::built_ins.blockDim
#define gridDim cuda_emulator::built_ins.gridDim

template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a > b ? a : b;
}

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return a < b ? a : b;
}

// The index of the least significant bit that is set, counted from 1, or 0.
inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}

// The accesses of these functions are reported by the functions themselves.
#define DCN_EMULATOR_INTRINSIC __attribute__((no_sanitize("thread"), noinline))

template <typename T>
DCN_EMULATOR_INTRINSIC T __shfl_xor_sync(
    unsigned mask,
    T value,
    int distance,
    int line = __builtin_LINE()) {
  static_assert(sizeof(T) <= 8, "wider than a shuffle");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = cuda_emulator::shuffle_xor(mask, bits, distance, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
DCN_EMULATOR_INTRINSIC T atomicAdd(T* to, T value) {
  cuda_emulator::atomic_access(to, sizeof(T));
  const T old = *to;
  *to = old + value;
  return old;
}

DCN_EMULATOR_INTRINSIC inline int atomicOr(int* to, int bits) {
  cuda_emulator::atomic_access(to, sizeof(int));
  const int old = *to;
  *to = old | bits;
  return old;
}

// One access, but an atomic addition for each of the four.
DCN_EMULATOR_INTRINSIC inline float4 atomicAdd(float4* to, float4 value) {
  cuda_emulator::atomic_access(to, sizeof(float4));
  const float4 old = *to;
  *to = {old.x + value.x, old.y + value.y, old.z + value.z, old.w + value.w};
  return old;
}
