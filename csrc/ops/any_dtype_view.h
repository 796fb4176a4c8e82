// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#pragma once

#include <algorithm>
#include <type_traits>

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "math/macros.h"

namespace dcn {

// The dtype of coordinates and accumulators for tensors of dtype S.
template <typename S>
using OpMathType = std::conditional_t<std::is_same_v<S, double>, double, float>;

// Element access to an (N, C, H, W) tensor of any floating dtype and strides,
// on the host and in kernels. Dispatches on the dtype for each element. That is
// cheap for offsets, masks and boxes, which are small beside the feature map,
// and avoids kernels for every combination of dtypes.
class AnyDtypeView {
 public:
  AnyDtypeView() = default; // undefined

  explicit AnyDtypeView(const at::Tensor& tensor)
      : data_(tensor.data_ptr()),
        dtype_(tensor.scalar_type()),
        n_(tensor.stride(0)),
        c_(tensor.stride(1)),
        h_(tensor.stride(2)),
        w_(tensor.stride(3)) {}

  DCN_INLINE bool defined() const {
    return data_ != nullptr;
  }

  DCN_INLINE int64_t at(int64_t n, int64_t c, int64_t y, int64_t x) const {
    return n * n_ + c * c_ + y * h_ + x * w_;
  }

  template <typename T>
  DCN_INLINE T load(int64_t index) const {
    switch (dtype_) {
      case at::kDouble:
        return static_cast<T>(static_cast<const double*>(data_)[index]);
      case at::kHalf:
        return static_cast<T>(static_cast<const c10::Half*>(data_)[index]);
      case at::kBFloat16:
        return static_cast<T>(static_cast<const c10::BFloat16*>(data_)[index]);
      default:
        return static_cast<T>(static_cast<const float*>(data_)[index]);
    }
  }

  // Positions from `begin` on of a channel, counted along rows of `width`; null
  // if they are not contiguous or have another dtype.
  template <typename T>
  const T* contiguous_positions(
      int64_t n,
      int64_t c,
      int64_t begin,
      int64_t width) const {
    const bool is_contiguous = w_ == 1 && h_ == width;
    return is_contiguous && dtype_ == c10::CppTypeToScalarType<T>::value
        ? static_cast<const T*>(data_) + at(n, c, 0, 0) + begin
        : nullptr;
  }

  // Loads positions [begin, end).
  template <typename T>
  void load_positions(
      int64_t n,
      int64_t c,
      int64_t begin,
      int64_t end,
      int64_t width,
      T* values) const {
    visit_rows(n, c, begin, end, width, [&](auto* row, int64_t count) {
      if (w_ == 1) { // for vectorization
        for (int64_t i = 0; i < count; ++i) {
          values[i] = static_cast<T>(row[i]);
        }
      } else {
        for (int64_t i = 0; i < count; ++i) {
          values[i] = static_cast<T>(row[i * w_]);
        }
      }
      values += count;
    });
  }

  // Prefetches them, unless they are strided.
  void prefetch_positions(
      int64_t n,
      int64_t c,
      int64_t begin,
      int64_t end,
      int64_t width) const {
    constexpr int64_t kCacheLine = 64;
    if (w_ != 1) {
      return;
    }
    visit_rows(n, c, begin, end, width, [](auto* row, int64_t count) {
      for (int64_t i = 0; i < count; i += kCacheLine / sizeof(*row)) {
        DCN_PREFETCH(row + i);
      }
    });
  }

  // Stores them.
  template <typename T>
  void store_positions(
      int64_t n,
      int64_t c,
      int64_t begin,
      int64_t end,
      int64_t width,
      const T* values) const {
    visit_rows(n, c, begin, end, width, [&](auto* row, int64_t count) {
      using S = std::remove_pointer_t<decltype(row)>;
      if (w_ == 1) {
        for (int64_t i = 0; i < count; ++i) {
          row[i] = static_cast<S>(values[i]);
        }
      } else {
        for (int64_t i = 0; i < count; ++i) {
          row[i * w_] = static_cast<S>(values[i]);
        }
      }
      values += count;
    });
  }

  template <typename T>
  DCN_INLINE void store(int64_t index, T value) const {
    switch (dtype_) {
      case at::kDouble:
        static_cast<double*>(data_)[index] = value;
        break;
      case at::kHalf:
        static_cast<c10::Half*>(data_)[index] = static_cast<float>(value);
        break;
      case at::kBFloat16:
        static_cast<c10::BFloat16*>(data_)[index] = static_cast<float>(value);
        break;
      default:
        static_cast<float*>(data_)[index] = static_cast<float>(value);
    }
  }

  template <typename T>
  DCN_INLINE void store_or_add(int64_t index, T value, bool adds) const {
    store(index, adds ? load<T>(index) + value : value);
  }

 private:
  template <typename Body>
  void visit_rows(
      int64_t n,
      int64_t c,
      int64_t begin,
      int64_t end,
      int64_t width,
      const Body& body) const {
    const auto visit = [&](auto* data) {
      if (h_ == width * w_) { // all rows are one
        body(data + at(n, c, 0, 0) + begin * w_, end - begin);
        return;
      }
      while (begin < end) {
        const int64_t x = begin % width;
        const int64_t count = std::min(width - x, end - begin);
        body(data + at(n, c, begin / width, x), count);
        begin += count;
      }
    };
    switch (dtype_) {
      case at::kDouble:
        return visit(static_cast<double*>(data_));
      case at::kHalf:
        return visit(static_cast<c10::Half*>(data_));
      case at::kBFloat16:
        return visit(static_cast<c10::BFloat16*>(data_));
      default:
        return visit(static_cast<float*>(data_));
    }
  }

  void* data_ = nullptr;
  at::ScalarType dtype_ = at::kFloat;
  int64_t n_ = 0, c_ = 0, h_ = 0, w_ = 0;
};

} // namespace dcn
