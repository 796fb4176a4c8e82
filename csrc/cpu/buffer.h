// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Working memory that starts at a cache line: vectors do not straddle two
// lines, and BLAS, whose bits may follow from the alignment, gives the same
// ones in every workspace.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace dcn::cpu {

template <typename T>
struct DeleteBuffer {
  void operator()(T* data) const {
    ::operator delete[](data, std::align_val_t{64});
  }
};

template <typename T>
using Buffer = std::unique_ptr<T[], DeleteBuffer<T>>;

// Not initialised.
template <typename T>
Buffer<T> make_buffer(int64_t size) {
  return Buffer<T>(static_cast<T*>(
      ::operator new[](size * sizeof(T), std::align_val_t{64})));
}

} // namespace dcn::cpu
