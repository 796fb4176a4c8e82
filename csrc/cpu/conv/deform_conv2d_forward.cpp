// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Forward pass: for each tile of output positions and each block of the K
// dimension, an im2col tile and a GEMM with the packed weight; then the
// epilogue adds the bias and converts to the dtype of the output. Parallel over
// the tiles.

#include "cpu/conv/deform_conv2d.h"

#include <algorithm>
#include <type_traits>

#include <ATen/ops/empty.h>

#include "cpu/buffer.h"
#include "cpu/channels_last_copy.h"
#include "cpu/conv/deform_im2col.h"
#include "cpu/conv/gemm.h"
#include "cpu/conv/packed_weight.h"
#include "cpu/parallel.h"
#include "cpu/transpose.h"

namespace dcn::cpu {
namespace {

// Budget for channels-last copies of images. Larger images are read in place.
constexpr int64_t kLayoutBytes = int64_t{24} << 20;
// Output positions of a tile, padded_size() of them. 48 to 96 rows suit the
// GEMM; fewer are taken where there would be fewer than kTasks tiles.
constexpr int64_t kTilePositions = 96;
constexpr int64_t kMinTilePositions = 12;
constexpr int64_t kTasks = 32;

template <typename S, typename T>
DCN_INLINE void store_rows_body(
    const T* values,
    int64_t stride,
    const T* bias,
    int64_t rows,
    int64_t columns,
    S* output,
    int64_t output_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = values + r * stride;
    S* to = output + r * output_stride;
    if (bias == nullptr) {
      for (int64_t c = 0; c < columns; ++c) {
        to[c] = round_to<S>(from[c]);
      }
    } else {
      for (int64_t c = 0; c < columns; ++c) {
        to[c] = round_to<S>(from[c] + bias[c]);
      }
    }
  }
}

} // namespace

// Stores the rows of a GEMM's result, plus bias[column] if there is a bias.
template <typename S, typename T>
void store_rows(
    const T* values,
    int64_t stride,
    const T* bias,
    int64_t rows,
    int64_t columns,
    S* output,
    int64_t output_stride);

#define DCN_DEFINE_EPILOGUE(S, T)                                    \
  template <>                                                        \
  DCN_VECTOR_CLONES void store_rows(                                 \
      const T* values,                                               \
      int64_t stride,                                                \
      const T* bias,                                                 \
      int64_t rows,                                                  \
      int64_t columns,                                               \
      S* output,                                                     \
      int64_t output_stride) {                                       \
    store_rows_body(                                                 \
        values, stride, bias, rows, columns, output, output_stride); \
  }

DCN_DEFINE_EPILOGUE(double, double)
DCN_DEFINE_EPILOGUE(float, float)
DCN_DEFINE_EPILOGUE(c10::Half, float)
DCN_DEFINE_EPILOGUE(c10::BFloat16, float)
#undef DCN_DEFINE_EPILOGUE

namespace {

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
        offsets_(conv_offsets(shape, inputs.offset, inputs.mask)),
        k_blocking_(shape, OperandLayout<C>::padded_k(1)),
        writes_planes_(can_write_planes()),
        weight_(
            writes_planes_ ? pack_filters(inputs.weight, shape, k_blocking_)
                           : pack_forward_weight<S, C>(
                                 inputs.weight,
                                 shape,
                                 k_blocking_)) {
    if (inputs.bias) {
      bias_ = inputs.bias->to(c10::CppTypeToScalarType<T>::value).contiguous();
    }
    const int64_t positions = shape.geometry.positions();
    tile_positions_ = padded_size(
        std::clamp<int64_t>(
            shape.batch * shape.groups * positions / kTasks,
            kMinTilePositions,
            kTilePositions));
    tiles_ = (positions + tile_positions_ - 1) / tile_positions_;
    // Groups of a task share the taps of their offset group.
    task_groups_ = shape.batch * tiles_ >= kTasks ? shape.groups : 1;
  }

  void run() {
    const auto& g = shape_.geometry;
    const int64_t image_bytes =
        int64_t{g.in_h} * g.in_w * shape_.in_channels * int64_t{sizeof(T)};
    const bool channels_last =
        !std::is_same_v<S, c10::Half> && input_.stride(1) == 1;
    if (channels_last || image_bytes > kLayoutBytes) {
      run_images<S>(0, shape_.batch, input_);
      return;
    }
    const int64_t channels_of_map = shape_.in_channels / shape_.offset_groups;
    const int64_t images = std::min(
        shape_.batch, kLayoutBytes / std::max<int64_t>(image_bytes, 1));
    // The channels of an offset group apart: fewer cache lines for its taps.
    at::Tensor copies = at::empty(
        {images * shape_.offset_groups, channels_of_map, g.in_h, g.in_w},
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
  // The task of one thread: a tile of output positions of some groups.
  struct Tile {
    int64_t image; // of the batch
    int64_t map; // index of the image in the maps that are read
    int64_t first_group;
    int64_t begin; // positions
    int64_t end;
  };
  struct Workspace {
    Buffer<C> columns; // (tile positions, depth of a K block)
    SamplingPlan<T> plan;
    Buffer<T> result; // (tile positions, group_out)
  };

  // Not a power of two, which would map all rows to the same few cache sets.
  int64_t result_stride() const {
    return shape_.group_out() + 16;
  }

  void copy_images(int64_t first, int64_t count, const at::Tensor& copies) {
    const auto& g = shape_.geometry;
    const int64_t maps = shape_.offset_groups; // of an image
    const int64_t channels = copies.size(1);
    parallel_tasks(count * maps * g.in_h, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t map = task / g.in_h;
        const int64_t row = task % g.in_h;
        copy_rows(
            feature_map_view<S>(
                input_, first + map / maps, map % maps * channels),
            feature_map_view<T>(copies, map, 0),
            row,
            row + 1,
            g.in_w,
            channels);
      }
    });
  }

  // `maps` holds images [first, first + count), in dtype M.
  template <typename M>
  void run_images(int64_t first, int64_t count, const at::Tensor& maps) {
    const int64_t group_tasks = shape_.groups / task_groups_;
    const int64_t tasks = count * group_tasks * tiles_;
    parallel_tasks(tasks, [&](int64_t begin, int64_t end) {
      const int64_t depth = OperandLayout<C>::padded_k(k_blocking_.max_depth);
      Workspace workspace{
          make_buffer<C>(tile_positions_ * depth),
          SamplingPlan<T>(offsets_, tile_positions_),
          make_buffer<T>(tile_positions_ * result_stride())};
      for (int64_t task = begin; task < end; ++task) {
        Tile tile{};
        tile.first_group = task / tiles_ % group_tasks * task_groups_;
        tile.map = task / tiles_ / group_tasks;
        tile.image = first + tile.map;
        tile.begin = task % tiles_ * tile_positions_;
        tile.end =
            std::min(tile.begin + tile_positions_, shape_.geometry.positions());
        run_tile<M>(maps, tile, workspace);
      }
      release_gemm<C>();
    });
  }

  // The slice of an image from this channel on. `maps` holds the channels of an
  // image together, or those of each offset group.
  template <typename M>
  FeatureMapView<const M> slice_of_map(
      const at::Tensor& maps,
      int64_t image,
      int64_t channel) const {
    const int64_t channels = maps.size(1);
    return feature_map_view<const M>(
        maps,
        (image * shape_.in_channels + channel) / channels,
        channel % channels);
  }

  template <typename M>
  void run_tile(
      const at::Tensor& maps,
      const Tile& tile,
      Workspace& workspace) {
    workspace.plan.select(tile.image, tile.begin, tile.end);
    int64_t offset_group = -1; // of the plan
    for (int64_t i = 0; i < task_groups_; ++i) {
      run_group<M>(maps, tile, tile.first_group + i, workspace, offset_group);
    }
  }

  // `offset_group` is that of the plan.
  template <typename M>
  void run_group(
      const at::Tensor& maps,
      const Tile& tile,
      int64_t group,
      Workspace& workspace,
      int64_t& offset_group) {
    const int64_t positions = tile.end - tile.begin;
    // Rows of the GEMM. Those after the positions are not stored.
    const int64_t rows = padded_size(positions);
    const Matrix<T> result = result_of(tile, group, rows, workspace);
    Store store = Store::kOverwrite;
    if (is_output(result, workspace) && bias_.defined()) {
      fill_rows(result, bias_of(group));
      store = Store::kAdd;
    }
    for (const auto& block : k_blocking_.blocks_of_group[group]) {
      const int64_t depth = OperandLayout<C>::padded_k(block.depth);
      for (const auto& segment : block.segments) {
        if (segment.slice.offset_group != offset_group) {
          offset_group = segment.slice.offset_group;
          workspace.plan.compute(
              offset_group,
              maps.stride(2),
              maps.stride(3),
              next_part(tile, offset_group));
        }
        deform_im2col<M, T, C>(
            slice_of_map<M>(maps, tile.map, segment.slice.begin),
            workspace.plan,
            segment.tap,
            {workspace.columns.get() + segment.column,
             positions,
             segment.taps,
             segment.slice.size,
             depth});
      }
      if constexpr (std::is_same_v<S, float>) {
        if (writes_planes_) {
          write_planes(tile, group, block, workspace);
          return;
        }
      }
      if (depth > block.depth) {
        for (int64_t p = 0; p < positions; ++p) {
          workspace.columns[p * depth + block.depth] = C(0);
        }
      }
      std::fill_n(
          workspace.columns.get() + positions * depth,
          (rows - positions) * depth,
          C(0));
      for_each_panel(result.columns, [&](int64_t first, int64_t last) {
        const int64_t width = last - first;
        const C* panel = weight_.data_ptr<C>() + first * k_blocking_.rows;
        gemm(
            Matrix<const C>{workspace.columns.get(), rows, depth, depth},
            Matrix<const C>{panel + block.row * width, depth, width, width},
            Matrix<T>{result.data + first, rows, width, result.stride},
            store);
      });
      store = Store::kAdd;
    }
    if (!is_output(result, workspace)) {
      store_tile(tile, group, result.data);
    }
  }

  // The taps that are computed after those of an offset group of a tile.
  typename SamplingPlan<T>::Part next_part(
      const Tile& tile,
      int64_t offset_group) const {
    if (offset_group + 1 < shape_.offset_groups) {
      return {offset_group + 1, tile.begin, tile.end};
    }
    const int64_t end =
        std::min(tile.end + tile_positions_, shape_.geometry.positions());
    return {0, tile.end, end};
  }

  // Whether a GEMM writes planes of the output, channels by positions. BLAS is
  // slower, but to transpose the result takes longer where the columns are
  // fewer than the outputs: kernels of 1x1.
  bool can_write_planes() const {
    const bool has_planes = output_.stride(1) != 1 && output_.is_contiguous();
    const bool has_one_block = k_blocking_.blocks_of_group[0].size() == 1;
    return std::is_same_v<S, float> && has_planes && has_one_block &&
        k_blocking_.max_depth < shape_.group_out();
  }

  void write_planes(
      const Tile& tile,
      int64_t group,
      const KBlock& block,
      const Workspace& workspace) const {
    const int64_t channels = shape_.group_out();
    const int64_t positions = tile.end - tile.begin;
    const int64_t plane = shape_.geometry.positions();
    const int64_t first = tile.image * shape_.out_channels + group * channels;
    const Matrix<float> planes{
        output_.data_ptr<float>() + first * plane + tile.begin,
        channels,
        positions,
        plane};
    const float* bias = bias_of(group);
    for (int64_t c = 0; bias != nullptr && c < channels; ++c) {
      std::fill_n(planes.data + c * plane, positions, bias[c]);
    }
    gemm_transposed(
        {weight_.data_ptr<float>() + block.row,
         channels,
         block.depth,
         k_blocking_.rows},
        {workspace.columns.get(), positions, block.depth, block.depth},
        planes,
        bias == nullptr ? Store::kOverwrite : Store::kAdd);
  }

  // Where the GEMMs of a tile accumulate: in the output if its dtype and layout
  // allow and no row is padding.
  Matrix<T> result_of(
      const Tile& tile,
      int64_t group,
      int64_t rows,
      const Workspace& workspace) const {
    const int64_t channels = shape_.group_out();
    if constexpr (std::is_same_v<S, T>) {
      if (rows == tile.end - tile.begin &&
          output_.is_contiguous(at::MemoryFormat::ChannelsLast)) {
        const int64_t row =
            tile.image * shape_.geometry.positions() + tile.begin;
        return {
            output_.data_ptr<T>() + row * shape_.out_channels +
                group * channels,
            rows,
            channels,
            shape_.out_channels};
      }
    }
    return {workspace.result.get(), rows, channels, result_stride()};
  }

  static bool is_output(const Matrix<T>& result, const Workspace& workspace) {
    return result.data != workspace.result.get();
  }

  // Null if there is no bias.
  const T* bias_of(int64_t group) const {
    return bias_.defined() ? bias_.data_ptr<T>() + group * shape_.group_out()
                           : nullptr;
  }

  static void fill_rows(const Matrix<T>& matrix, const T* row) {
    for (int64_t i = 0; i < matrix.rows; ++i) {
      std::copy_n(row, matrix.columns, matrix.data + i * matrix.stride);
    }
  }

  void store_tile(const Tile& tile, int64_t group, const T* result) const {
    const int64_t channels = shape_.group_out();
    const int64_t first = group * channels;
    const T* bias = bias_of(group);
    S* to = output_.data_ptr<S>() + tile.image * output_.stride(0) +
        first * output_.stride(1) + tile.begin * output_.stride(3);
    const int64_t rows = tile.end - tile.begin;
    if (output_.stride(1) == 1) {
      store_rows(
          result, result_stride(), bias, rows, channels, to, output_.stride(3));
    } else {
      transpose<T, S, false>(
          result, result_stride(), rows, channels, bias, to, output_.stride(1));
    }
  }

  const DeformConvShape& shape_;
  const at::Tensor& input_;
  const at::Tensor& output_;
  ConvOffsets offsets_;
  KBlocking k_blocking_;
  bool writes_planes_;
  at::Tensor weight_; // packed
  at::Tensor bias_;
  int64_t tile_positions_;
  int64_t tiles_; // of one image
  int64_t task_groups_; // groups of a task: one, or all
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
