// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "cpu/deform_conv2d_forward.h"

#include <algorithm>
#include <memory>
#include <type_traits>

#include <ATen/ops/empty.h>

#include "cpu/columns.h"
#include "cpu/copy_rows.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"

namespace dcn {
namespace {

// Channels-last copies of images; larger images are read where they are.
constexpr int64_t kLayoutBytes = int64_t{24} << 20;
// The columns of one block of positions: about a core's own cache.
constexpr int64_t kColumnBytes = int64_t{1} << 20;

template <typename S, typename T>
class Forward {
 public:
  Forward(
      const DeformConvShape& shape,
      const ForwardInputs& inputs,
      const at::Tensor& output)
      : shape_(shape),
        input_(inputs.input),
        output_(output),
        taps_(tap_source(shape, inputs.offset, inputs.mask)),
        weight_(pack_weight(
            inputs.weight,
            shape,
            c10::CppTypeToScalarType<T>::value)),
        slices_(shape.slices(shape.in_channels)) {
    if (inputs.bias) {
      bias_ = inputs.bias->to(c10::CppTypeToScalarType<T>::value).contiguous();
    }
    const int64_t depth = shape.geometry.taps() * shape.group_in();
    block_ = std::clamp<int64_t>(
        kColumnBytes / (depth * int64_t{sizeof(T)}), 16, 512);
    blocks_ = (shape.geometry.positions() + block_ - 1) / block_;
  }

  void run() {
    const auto& g = shape_.geometry;
    const int64_t image_bytes =
        int64_t{g.in_h} * g.in_w * shape_.in_channels * int64_t{sizeof(T)};
    const bool readable = std::is_same_v<S, T> && input_.stride(1) == 1;
    if (readable || image_bytes > kLayoutBytes) {
      run_images<S>(0, shape_.batch, input_);
      return;
    }
    const int64_t images = std::min(
        shape_.batch, kLayoutBytes / std::max<int64_t>(image_bytes, 1));
    at::Tensor copies = at::empty(
        {images, shape_.in_channels, g.in_h, g.in_w},
        input_.options()
            .dtype(c10::CppTypeToScalarType<T>::value)
            .memory_format(at::MemoryFormat::ChannelsLast));
    for (int64_t first = 0; first < shape_.batch; first += images) {
      const int64_t count = std::min(images, shape_.batch - first);
      copy_images(first, count, copies);
      run_images<T>(first, count, copies);
    }
  }

 private:
  void copy_images(int64_t first, int64_t count, const at::Tensor& copies) {
    const auto& g = shape_.geometry;
    parallel_tasks(count * g.in_h, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / g.in_h;
        const int64_t row = task % g.in_h;
        copy_rows(
            map_view<S>(input_, first + image, 0),
            map_view<T>(copies, image, 0),
            row,
            row + 1,
            g.in_w,
            shape_.in_channels);
      }
    });
  }

  // `maps` holds images [first, first + count).
  template <typename M>
  void run_images(int64_t first, int64_t count, const at::Tensor& maps) {
    const int64_t tasks = count * shape_.groups * blocks_;
    parallel_tasks(tasks, [&](int64_t begin, int64_t end) {
      const int64_t taps = shape_.geometry.taps();
      const auto columns =
          std::make_unique<T[]>(block_ * taps * shape_.group_in());
      const auto located = std::make_unique<DeformTap<T>[]>(block_ * taps);
      const auto result = std::make_unique<T[]>(block_ * shape_.group_out());
      for (int64_t task = begin; task < end; ++task) {
        const int64_t block = task % blocks_;
        const int64_t group = task / blocks_ % shape_.groups;
        const int64_t image = task / blocks_ / shape_.groups;
        const int64_t from = block * block_;
        const int64_t to = std::min(from + block_, shape_.geometry.positions());
        gather<M>(
            maps,
            image,
            first + image,
            group,
            from,
            to,
            located.get(),
            columns.get());
        multiply(first + image, group, from, to, columns.get(), result.get());
      }
    });
  }

  // Columns (positions, taps, group_in) of one group.
  template <typename M>
  void gather(
      const at::Tensor& maps,
      int64_t map_image,
      int64_t image,
      int64_t group,
      int64_t from,
      int64_t to,
      DeformTap<T>* located,
      T* columns) {
    const int64_t taps = shape_.geometry.taps();
    for (const auto& slice : slices_) {
      if (slice.group != group) {
        continue;
      }
      locate_taps(taps_, image, slice.offset_group, from, to, located);
      const int64_t within = slice.begin - group * shape_.group_in();
      gather_columns<M, T>(
          map_view<const M>(maps, map_image, slice.begin),
          located,
          Columns<T>{
              columns + within,
              to - from,
              taps,
              taps * shape_.group_in(),
              shape_.group_in(),
              slice.size});
    }
  }

  // output = columns * weight + bias, in whichever order lets the product be
  // written in rows of the output's layout.
  void multiply(
      int64_t image,
      int64_t group,
      int64_t from,
      int64_t to,
      T* columns,
      T* result) {
    const int64_t positions = to - from;
    const int64_t depth = shape_.geometry.taps() * shape_.group_in();
    const int64_t channels = shape_.group_out();
    const int64_t first = group * channels;
    const int64_t stride = output_.stride(1);
    const int64_t column_stride = output_.stride(3);
    S* out = output_.data_ptr<S>() + image * output_.stride(0) +
        first * stride + from * column_stride;

    Matrix<T> product = stride == 1
        ? row_major(result, positions, channels)
        : row_major(result, channels, positions).transposed();
    if constexpr (std::is_same_v<S, T>) {
      product = {out, positions, channels, column_stride, stride};
    }
    if (bias_.defined()) {
      const T* bias = bias_.data_ptr<T>() + first;
      for_each_in_rows(product, [&](T& value, int64_t, int64_t channel) {
        value = bias[channel];
      });
    }
    const Matrix<T> weight =
        row_major(weight_.data_ptr<T>() + first * depth, channels, depth);
    gemm(
        row_major(columns, positions, depth),
        weight.transposed(),
        product,
        bias_.defined() ? Store::kAdd : Store::kOverwrite);
    if constexpr (!std::is_same_v<S, T>) {
      for_each_in_rows(
          product, [&](T value, int64_t position, int64_t channel) {
            out[position * column_stride + channel * stride] =
                static_cast<S>(value);
          });
    }
  }

  // Visits a (positions, channels) matrix along its contiguous rows.
  template <typename Visit>
  static void for_each_in_rows(const Matrix<T>& matrix, const Visit& visit) {
    if (matrix.column_stride == 1) {
      for (int64_t p = 0; p < matrix.rows; ++p) {
        for (int64_t c = 0; c < matrix.columns; ++c) {
          visit(matrix.data[p * matrix.row_stride + c], p, c);
        }
      }
    } else {
      for (int64_t c = 0; c < matrix.columns; ++c) {
        for (int64_t p = 0; p < matrix.rows; ++p) {
          visit(
              matrix.data[p * matrix.row_stride + c * matrix.column_stride],
              p,
              c);
        }
      }
    }
  }

  const DeformConvShape& shape_;
  const at::Tensor& input_;
  const at::Tensor& output_;
  TapSource taps_;
  at::Tensor weight_; // (groups, group_out, taps, group_in)
  at::Tensor bias_;
  std::vector<ChannelSlice> slices_;
  int64_t block_; // positions whose columns are made at once
  int64_t blocks_; // blocks of one image
};

} // namespace

template <typename S, typename T>
void deform_conv2d_forward(
    const DeformConvShape& shape,
    const ForwardInputs& inputs,
    const at::Tensor& output) {
  Forward<S, T>(shape, inputs, output).run();
}

#define DCN_INSTANTIATE_FORWARD(S, T)        \
  template void deform_conv2d_forward<S, T>( \
      const DeformConvShape&, const ForwardInputs&, const at::Tensor&);

DCN_INSTANTIATE_FORWARD(double, double)
DCN_INSTANTIATE_FORWARD(float, float)
DCN_INSTANTIATE_FORWARD(c10::Half, float)
DCN_INSTANTIATE_FORWARD(c10::BFloat16, float)
#undef DCN_INSTANTIATE_FORWARD

} // namespace dcn
