// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Deterministic gradient of the input of RoI pooling, used under
// torch.use_deterministic_algorithms: each pixel sums the contributions of the
// bins that read it, in a fixed order. The map is divided into cells. Per cell
// and bin there is a bit for every RoI: whether the bin reads the cell. A pixel
// visits the bits of its cell.

#include <algorithm>

#include <ATen/ops/zeros.h>

#include "cuda/roi/bin_threads.cuh"

namespace dcn::cuda {
namespace {

// The largest number of rows, and of columns, of cells of a map.
constexpr int kCellsPerAxis = 8;
// RoIs per word of bits.
constexpr int kWordRois = 32;
// Budget for the bits of a range of RoIs.
constexpr int64_t kBitBytes = int64_t{32} << 20;

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

// Which bins read which cells, for a range of RoIs.
struct CellBits {
  CellGrid cells;
  int64_t words; // per cell and bin
  int32_t* data; // (images, classes, rows, columns, bins, words)

  // The words of bin (0, 0) for a cell.
  __device__ int32_t* of_cell(
      const RoiPoolShape& shape,
      int64_t image, // in the tile
      int64_t class_index,
      int row,
      int column) const {
    const int64_t map = image * shape.classes + class_index;
    const int64_t cell = (map * cells.rows + row) * cells.columns + column;
    return data + cell * shape.bins.count() * words;
  }
};

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
struct CellBitsParams {
  RoiTile<S, T> tile;
  CellBits bits; // zeros
};

// One thread per bin.
template <typename S, typename T>
__global__ void cell_bits_kernel(CellBitsParams<S, T> params) {
  const auto& tile = params.tile;
  const auto& shape = tile.geometry.shape;
  const auto& cells = params.bits.cells;
  const int64_t bins = num_bins(tile);
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
       index < bins;
       index += step) {
    const ClassBin<T> bin_index(tile, index);
    const auto bin = bin_index.locate(tile);
    const int64_t image = bin.image - tile.first_image;
    if (bin.state != RoiState::kInside || image < 0 || image >= tile.images) {
      continue;
    }
    const PixelRange y = pixels_of(bin.y), x = pixels_of(bin.x);
    if (y.last < y.first || x.last < x.first) {
      continue;
    }
    const int64_t word = (int64_t{bin_index.i} * shape.bins.w + bin_index.j) *
            params.bits.words +
        bin_index.roi / kWordRois;
    const int bit = static_cast<int>(1u << bin_index.roi % kWordRois);
    for (int row = y.first / cells.height; row <= y.last / cells.height;
         ++row) {
      for (int column = x.first / cells.width; column <= x.last / cells.width;
           ++column) {
        int32_t* cell = params.bits.of_cell(
            shape, image, bin_index.class_index, row, column);
        atomicOr(cell + word, bit);
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
  CellBits bits;
};

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

// Adds the contributions of the bins of a group to pixel (y, x), as above.
template <int kSize, typename S, typename T>
__device__ void add_group(
    const DeterministicParams<S, T>& params,
    int64_t image,
    int group,
    int y,
    int x,
    int64_t c,
    T (&sums)[kSize]) {
  const auto& tile = params.tile;
  const auto& shape = tile.geometry.shape;
  const auto& cells = params.bits.cells;
  const int64_t words = params.bits.words;
  const int64_t class_index = c / shape.channels_per_class();
  const int32_t* cell = params.bits.of_cell(
      shape, image, class_index, y / cells.height, x / cells.width);
  const int row = group / shape.groups.w, column = group % shape.groups.w;
  const int end_i = first_bin(row + 1, shape.groups.h, shape.bins.h);
  const int end_j = first_bin(column + 1, shape.groups.w, shape.bins.w);
  const int begin_j = first_bin(column, shape.groups.w, shape.bins.w);
  for (int i = first_bin(row, shape.groups.h, shape.bins.h); i < end_i; ++i) {
    for (int j = begin_j; j < end_j; ++j) {
      const int64_t bin = int64_t{i} * shape.bins.w + j;
      for (int64_t word = 0; word < words; ++word) {
        for (unsigned rois = cell[bin * words + word]; rois != 0;
             rois &= rois - 1) {
          const int64_t roi = word * kWordRois + __ffs(rois) - 1;
          const ClassBin<T> bin_index(
              tile,
              (roi * shape.bins.count() + bin) * shape.classes + class_index);
          add_bin(tile, bin_index, y, x, c, sums);
        }
      }
    }
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
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
       index < count;
       index += step) {
    const int64_t channel = index % channel_blocks * kSize;
    const int group = index / channel_blocks % groups;
    const int64_t pixel = index / channel_blocks / groups % pixels;
    const int64_t image = index / channel_blocks / groups / pixels;
    const int y = pixel / shape.map.w, x = pixel % shape.map.w;
    T sums[kSize] = {};
    add_group(params, image, group, y, x, tile.first_channel + channel, sums);
    const auto input = params.gradients.input.view(image, group, channel);
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      input.pixel(y, x)[k * input.channel_stride] += sums[k];
    }
  }
}

// The gradient of one range of RoIs.
template <typename S, typename T>
void backward_range(
    RoiTile<S, T> tile,
    const RoiTileGradients<S, T>& gradients,
    const CellBits& bits) {
  const auto& shape = tile.geometry.shape;
  launch(
      cell_bits_kernel<S, T>, CellBitsParams<S, T>{tile, bits}, num_bins(tile));
  constexpr int kWide = kVectorSize<S>;
  const bool wide = divides_channels(tile, kWide);
  const int64_t size = wide ? kWide : 1;
  assign_threads(tile, size);
  launch(
      wide ? deterministic_kernel<S, T, kWide> : deterministic_kernel<S, T, 1>,
      DeterministicParams<S, T>{tile, gradients, bits},
      tile.images * shape.map.count() * shape.groups.count() *
          (tile.channels / size));
}

} // namespace

template <typename S, typename T>
void backward_input_deterministic(
    RoiTile<S, T> tile,
    const RoiTileGradients<S, T>& gradients,
    const at::TensorOptions& options) {
  const auto& shape = tile.geometry.shape;
  const CellGrid cells(shape);
  const int64_t bins = tile.images * shape.classes * cells.rows *
      cells.columns * shape.bins.count();
  const int64_t max_words =
      std::max<int64_t>(kBitBytes / (bins * int64_t{sizeof(int32_t)}), 1);
  const int64_t end = tile.first_roi + tile.rois;
  for (; tile.first_roi < end; tile.first_roi += tile.rois) {
    tile.rois = std::min(end - tile.first_roi, max_words * kWordRois);
    const int64_t words = (tile.rois + kWordRois - 1) / kWordRois;
    const at::Tensor data = at::zeros({bins * words}, options.dtype(at::kInt));
    backward_range(tile, gradients, {cells, words, data.data_ptr<int32_t>()});
  }
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
