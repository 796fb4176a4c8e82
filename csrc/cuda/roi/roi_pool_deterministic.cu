// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Deterministic gradient of the input of RoI pooling, used under
// torch.use_deterministic_algorithms: each pixel sums the contributions of the
// bins that read it, in a fixed order. The map is divided into cells; the bins
// are sorted by the cells that they read, and a pixel visits those of its cell.

#include <limits>

#include <ATen/ops/empty.h>
#include <ATen/ops/sort.h>

#include "cuda/roi/bin_threads.cuh"

namespace dcn::cuda {
namespace {

// The key of a bin that does not read a cell, sorted behind all cells.
constexpr int64_t kNoCell = std::numeric_limits<int64_t>::max();

// The cells of a map.
struct CellGrid {
  int height; // of a cell, in pixels
  int width;
  int rows;
  int columns;

  explicit CellGrid(const RoiPoolShape& shape)
      : height((shape.map.h + kCellsPerAxis - 1) / kCellsPerAxis),
        width((shape.map.w + kCellsPerAxis - 1) / kCellsPerAxis),
        rows((shape.map.h + height - 1) / height),
        columns((shape.map.w + width - 1) / width) {}
};

// Bins with the same key contribute to the same cell: of a class, an image and
// a group of channels.
template <typename S, typename T>
__device__ int64_t cell_key(
    const RoiTile<S, T>& tile,
    const CellGrid& cells,
    int64_t class_index,
    int64_t image, // in the tile
    int group,
    int row,
    int column) {
  const int64_t map =
      (class_index * tile.images + image) * tile.geometry.shape.groups.count() +
      group;
  return (map * cells.rows + row) * cells.columns + column;
}

// The pixels that the samples of a bin read along one axis.
struct PixelRange {
  int first;
  int last; // less than first if there are none
};

template <typename T>
__device__ PixelRange pixels_of(const BinAxis<T>& bin) {
  PixelRange range{bin.extent, -1};
  for (int64_t i = bin.begin; i < bin.end; ++i) {
    const BinSample<T> sample = bin_sample(bin, i);
    if (sample.kept) {
      range.first = min(range.first, sample.tap.pixel[0]);
      range.last = max(range.last, sample.tap.pixel[1]);
    }
  }
  return range;
}

template <typename S, typename T>
struct CellKeyParams {
  RoiTile<S, T> tile;
  CellGrid cells;
  int64_t* keys; // (cells, bins)
};

// One thread per bin.
template <typename S, typename T>
__global__ void cell_key_kernel(CellKeyParams<S, T> params) {
  const auto& tile = params.tile;
  const auto& cells = params.cells;
  const int64_t bins = num_bins(tile);
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
       index < bins;
       index += step) {
    const ClassBin<T> bin_index(tile, index);
    const auto bin = bin_index.locate(tile);
    const int64_t image = bin.image - tile.first_image;
    const bool reads =
        bin.state == RoiState::kInside && image >= 0 && image < tile.images;
    const int group = tile.geometry.shape.group_of(bin_index.i, bin_index.j);
    const PixelRange y = reads ? pixels_of(bin.y) : PixelRange{0, -1};
    const PixelRange x = reads ? pixels_of(bin.x) : PixelRange{0, -1};
    for (int row = 0; row < cells.rows; ++row) {
      for (int column = 0; column < cells.columns; ++column) {
        const bool reads_cell = y.first < (row + 1) * cells.height &&
            y.last >= row * cells.height &&
            x.first < (column + 1) * cells.width &&
            x.last >= column * cells.width;
        params.keys[(row * cells.columns + column) * bins + index] = reads_cell
            ? cell_key(
                  tile, cells, bin_index.class_index, image, group, row, column)
            : kNoCell;
      }
    }
  }
}

// The weight of a bin at one pixel, along one axis.
template <typename T>
__device__ T weight_at(const BinAxis<T>& bin, int pixel) {
  T weight = T(0);
  for (int64_t i = bin.begin; i < bin.end; ++i) {
    const BinSample<T> sample = bin_sample(bin, i);
    for (int k = 0; k < 2; ++k) {
      weight += sample.kept && sample.tap.pixel[k] == pixel
          ? sample.tap.weight[k]
          : T(0);
    }
  }
  return weight;
}

template <typename S, typename T>
struct DeterministicParams {
  RoiTile<S, T> tile;
  RoiTileGradients<S, T> gradients;
  CellGrid cells;
  const int64_t* keys; // sorted
  const int64_t* order; // indices into (cells, bins), in the order of the keys
  int64_t count;
};

// The first index whose key is not less than `key`.
__device__ inline int64_t lower_bound(
    const int64_t* keys,
    int64_t count,
    int64_t key) {
  int64_t low = 0;
  while (count > 0) {
    const int64_t half = count / 2;
    const bool less = keys[low + half] < key;
    low = less ? low + half + 1 : low;
    count = less ? count - half - 1 : half;
  }
  return low;
}

// Adds the contribution of a bin to pixel (y, x) of kSize output channels, from
// `c` on, to `sums`.
template <int kSize, typename S, typename T>
__device__ void add_bin(
    const RoiTile<S, T>& tile,
    const ClassBin<T>& bin_index,
    int y,
    int x,
    int64_t c,
    T (&sums)[kSize]) {
  const auto bin = bin_index.locate(tile);
  const T weight_y = weight_at(bin.y, y);
  const T weight = weight_y == T(0) ? weight_y : weight_y * weight_at(bin.x, x);
  if (weight == T(0)) {
    return;
  }
  const T divisor = divisor_of(bin);
  T gradient[kSize];
  load_pooled(
      tile,
      tile.pooled.pixel(bin_index.i, bin_index.j) +
          (tile.first_roi + bin_index.roi) * tile.pooled_stride +
          c * tile.pooled.channel_stride,
      gradient);
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    sums[k] += weight * (gradient[k] / divisor);
  }
}

// One thread per pixel, group and kSize channels.
template <typename S, typename T, int kSize>
__global__ void deterministic_kernel(DeterministicParams<S, T> params) {
  const auto& tile = params.tile;
  const auto& shape = tile.geometry.shape;
  const int64_t channel_blocks = tile.channels / kSize;
  const int64_t groups = shape.groups.count();
  const int64_t pixels = shape.map.count();
  const int64_t count = tile.images * pixels * groups * channel_blocks;
  const int64_t bins = num_bins(tile);
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
       index < count;
       index += step) {
    const int64_t channel = index % channel_blocks * kSize;
    const int group = index / channel_blocks % groups;
    const int64_t pixel = index / channel_blocks / groups % pixels;
    const int64_t image = index / channel_blocks / groups / pixels;
    const int y = pixel / shape.map.w, x = pixel % shape.map.w;
    const int64_t c = tile.first_channel + channel;
    const int64_t key = cell_key(
        tile,
        params.cells,
        c / shape.channels_per_class(),
        image,
        group,
        y / params.cells.height,
        x / params.cells.width);
    T sums[kSize] = {};
    for (int64_t i = lower_bound(params.keys, params.count, key);
         i < params.count && params.keys[i] == key;
         ++i) {
      const ClassBin<T> bin_index(tile, params.order[i] % bins);
      add_bin(tile, bin_index, y, x, c, sums);
    }
    const auto input = params.gradients.input.view(image, group, channel);
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      input.pixel(y, x)[k * input.channel_stride] += sums[k];
    }
  }
}

} // namespace

template <typename S, typename T>
void backward_input_deterministic(
    RoiTile<S, T> tile,
    const RoiTileGradients<S, T>& gradients,
    const at::TensorOptions& options) {
  const CellGrid cells(tile.geometry.shape);
  const int64_t bins = num_bins(tile);
  const at::Tensor keys =
      at::empty({cells.rows * cells.columns * bins}, options.dtype(at::kLong));
  launch(
      cell_key_kernel<S, T>,
      CellKeyParams<S, T>{tile, cells, keys.data_ptr<int64_t>()},
      bins);
  const auto [sorted, order] =
      at::sort(keys, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  constexpr int kWide = kVectorSize<S>;
  const bool wide = divides_channels(tile, kWide);
  const int64_t size = wide ? kWide : 1;
  const auto& shape = tile.geometry.shape;
  assign_threads(tile, size);
  launch(
      wide ? deterministic_kernel<S, T, kWide> : deterministic_kernel<S, T, 1>,
      DeterministicParams<S, T>{
          tile,
          gradients,
          cells,
          sorted.template data_ptr<int64_t>(),
          order.template data_ptr<int64_t>(),
          keys.numel()},
      tile.images * shape.map.count() * shape.groups.count() *
          (tile.channels / size));
}

#define DCN_INSTANTIATE_DETERMINISTIC(S, T)   \
  template void backward_input_deterministic( \
      RoiTile<S, T>, const RoiTileGradients<S, T>&, const at::TensorOptions&);

DCN_INSTANTIATE_DETERMINISTIC(double, double)
DCN_INSTANTIATE_DETERMINISTIC(float, float)
DCN_INSTANTIATE_DETERMINISTIC(c10::Half, float)
DCN_INSTANTIATE_DETERMINISTIC(c10::BFloat16, float)
#undef DCN_INSTANTIATE_DETERMINISTIC

} // namespace dcn::cuda
