// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "cpu/conv/deform_conv2d_forward.h"

#include <algorithm>
#include <memory>
#include <type_traits>

#include <ATen/ops/empty.h>

#include "cpu/channels_last_copy.h"
#include "cpu/conv/deform_im2col.h"
#include "cpu/conv/epilogue.h"
#include "cpu/conv/gemm.h"
#include "cpu/conv/packed_weight.h"
#include "cpu/parallel.h"

namespace dcn::cpu {
namespace {

// Channels-last copies of images; larger images are read where they are.
constexpr int64_t kLayoutBytes = int64_t{24} << 20;
// Positions of a block: 48 to 96 rows suit the products; fewer where there
// would be too few blocks to keep the threads busy.
constexpr int64_t kBlock = 48;
constexpr int64_t kLeastBlock = 12;
constexpr int64_t kTasks = 32;

template <typename S, typename T, typename C>
class Forward {
 public:
  Forward(
      const DeformConvShape& shape,
      const ForwardInputs& inputs,
      const at::Tensor& output)
      : shape_(shape),
        input_(inputs.input),
        output_(output),
        taps_(conv_offsets(shape, inputs.offset, inputs.mask)),
        k_blocking_(shape, OperandLayout<C>::padded_k(1)),
        weight_(pack_forward_weight<S, C>(inputs.weight, shape, k_blocking_)) {
    if (inputs.bias) {
      bias_ = inputs.bias->to(c10::CppTypeToScalarType<T>::value).contiguous();
    }
    const int64_t positions = shape.geometry.positions();
    block_ = std::clamp<int64_t>(
        shape.batch * shape.groups * positions / kTasks, kLeastBlock, kBlock);
    blocks_ = (positions + block_ - 1) / block_;
  }

  void run() {
    const auto& g = shape_.geometry;
    const int64_t image_bytes =
        int64_t{g.in_h} * g.in_w * shape_.in_channels * int64_t{sizeof(T)};
    const bool readable =
        !std::is_same_v<S, c10::Half> && input_.stride(1) == 1;
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
  // Where one task works.
  struct Block {
    int64_t image; // of the batch
    int64_t map; // of the maps that are read
    int64_t group;
    int64_t begin; // positions
    int64_t end;
  };
  struct Buffers {
    std::unique_ptr<C[]> columns; // (block, chunk)
    std::unique_ptr<DeformTap<T>[]> taps; // (block, taps)
    std::unique_ptr<T[]> result; // (block, group_out)
  };

  // A power of two between the rows would put them into the same few lines of
  // the cache.
  int64_t result_stride() const {
    return shape_.group_out() + 16;
  }

  void copy_images(int64_t first, int64_t count, const at::Tensor& copies) {
    const auto& g = shape_.geometry;
    parallel_tasks(count * g.in_h, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / g.in_h;
        const int64_t row = task % g.in_h;
        copy_rows(
            feature_map_view<S>(input_, first + image, 0),
            feature_map_view<T>(copies, image, 0),
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
      Buffers buffers;
      buffers.columns.reset(
          new C[block_ * OperandLayout<C>::padded_k(k_blocking_.max_depth)]);
      buffers.taps.reset(new DeformTap<T>[block_ * shape_.geometry.taps()]);
      buffers.result.reset(new T[block_ * result_stride()]);
      for (int64_t task = begin; task < end; ++task) {
        Block block{};
        block.group = task / blocks_ % shape_.groups;
        block.map = task / blocks_ / shape_.groups;
        block.image = first + block.map;
        block.begin = task % blocks_ * block_;
        block.end = std::min(block.begin + block_, shape_.geometry.positions());
        run_block<M>(maps, block, buffers);
      }
      release_gemm<C>();
    });
  }

  template <typename M>
  void run_block(
      const at::Tensor& maps,
      const Block& block,
      const Buffers& buffers) {
    const int64_t positions = block.end - block.begin;
    const int64_t channels = shape_.group_out();
    int64_t located = -1;
    Store store = Store::kOverwrite;
    for (const auto& chunk : k_blocking_.blocks_of_group[block.group]) {
      const int64_t depth = OperandLayout<C>::padded_k(chunk.depth);
      for (const auto& segment : chunk.segments) {
        if (segment.slice.offset_group != located) {
          located = segment.slice.offset_group;
          compute_taps(
              taps_,
              block.image,
              located,
              block.begin,
              block.end,
              buffers.taps.get());
        }
        deform_im2col<M, T, C>(
            feature_map_view<const M>(maps, block.map, segment.slice.begin),
            buffers.taps.get() + segment.tap,
            shape_.geometry.taps(),
            {buffers.columns.get() + segment.column,
             positions,
             segment.taps,
             segment.slice.size,
             depth});
      }
      if (depth > chunk.depth) {
        for (int64_t p = 0; p < positions; ++p) {
          buffers.columns[p * depth + chunk.depth] = C(0);
        }
      }
      gemm(
          Matrix<const C>{buffers.columns.get(), positions, depth, depth},
          Matrix<const C>{
              weight_.data_ptr<C>() + chunk.row * channels,
              depth,
              channels,
              channels},
          Matrix<T>{buffers.result.get(), positions, channels, result_stride()},
          store);
      store = Store::kAdd;
    }
    store_block(block, buffers.result.get());
  }

  void store_block(const Block& block, const T* result) const {
    const int64_t channels = shape_.group_out();
    const int64_t first = block.group * channels;
    store_epilogue(
        result,
        result_stride(),
        bias_.defined() ? bias_.data_ptr<T>() + first : nullptr,
        block.end - block.begin,
        channels,
        output_.data_ptr<S>() + block.image * output_.stride(0) +
            first * output_.stride(1) + block.begin * output_.stride(3),
        output_.stride(3),
        output_.stride(1));
  }

  const DeformConvShape& shape_;
  const at::Tensor& input_;
  const at::Tensor& output_;
  ConvOffsets taps_;
  KBlocking k_blocking_;
  at::Tensor weight_;
  at::Tensor bias_;
  int64_t block_; // positions whose columns are made at once
  int64_t blocks_; // blocks of one image
};

} // namespace

template <typename S, typename T, typename C>
void deform_conv2d_forward(
    const DeformConvShape& shape,
    const ForwardInputs& inputs,
    const at::Tensor& output) {
  Forward<S, T, C>(shape, inputs, output).run();
}

#define DCN_INSTANTIATE_FORWARD(S, T, C)        \
  template void deform_conv2d_forward<S, T, C>( \
      const DeformConvShape&, const ForwardInputs&, const at::Tensor&);

DCN_INSTANTIATE_FORWARD(double, double, double)
DCN_INSTANTIATE_FORWARD(float, float, float)
DCN_INSTANTIATE_FORWARD(c10::Half, float, float)
DCN_INSTANTIATE_FORWARD(c10::BFloat16, float, float)
DCN_INSTANTIATE_FORWARD(c10::BFloat16, float, c10::BFloat16)
#undef DCN_INSTANTIATE_FORWARD

} // namespace dcn::cpu
