// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include <limits>

#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "cuda/conv/row_ranges.cuh"
#include "cuda/roi/roi_bins.cuh"
#include "ops/copy_plan.h"
#include "ops/roi_pool_op.h"

namespace dcn::cuda {
namespace {

// Slices narrower than this are not worth their copies.
constexpr int64_t kNarrowestCopy = 16;
// Gradients of the bins of one chunk of RoIs.
constexpr int64_t kOffsetGradBytes = int64_t{32} << 20;

// Channels [channel, channel + channels) of every group, of some images:
// (images, channels, groups, H, W), a view.
at::Tensor grouped_view(
    const at::Tensor& tensor,
    const RoiPoolShape& shape,
    int64_t image,
    int64_t images,
    int64_t channel,
    int64_t channels) {
  const int64_t groups = shape.groups.count();
  return tensor.narrow(0, image, images)
      .narrow(1, channel * groups, channels * groups)
      .unflatten(1, {channels, groups});
}

// The same with the channels of a group as neighbours in memory, not filled.
at::Tensor empty_channels_last(const at::Tensor& like, at::ScalarType dtype) {
  return at::empty(
             {like.size(0),
              like.size(3),
              like.size(4),
              like.size(2),
              like.size(1)},
             like.options().dtype(dtype))
      .permute({0, 4, 3, 1, 2});
}

template <typename S>
GroupedMaps<S> maps_of(const at::Tensor& tensor) {
  return {
      {static_cast<S*>(tensor.data_ptr()),
       tensor.stride(1),
       tensor.stride(3),
       tensor.stride(4)},
      tensor.stride(0),
      tensor.size(2) > 1 ? tensor.stride(2) : 0};
}

bool is_channels_last(const at::Tensor& input, const RoiPoolShape& shape) {
  return shape.groups.count() == 1 &&
      memory_format_of(input) == at::MemoryFormat::ChannelsLast;
}

// Calls visit(first image, images, first channel, channels) for slices and
// groups of images whose copies fit.
template <typename Visit>
void for_each_copy(
    const RoiPoolShape& shape,
    const ChannelTiling& tiling,
    const Visit& visit) {
  const int64_t images = std::max<int64_t>(
      kCopyBytes / std::max<int64_t>(tiling.image_bytes, 1), 1);
  for (int64_t channel = 0; channel < shape.channels;
       channel += tiling.widest) {
    for (int64_t image = 0; image < shape.batch; image += images) {
      visit(
          image,
          std::min(images, shape.batch - image),
          channel,
          std::min(tiling.widest, shape.channels - channel));
    }
  }
}

template <typename S>
RoiTile<S, OpMathType<S>> make_tile(
    const RoiGeometry& source,
    int64_t first_roi,
    int64_t rois,
    const at::Tensor& pooled) {
  RoiTile<S, OpMathType<S>> tile{};
  tile.source = source;
  tile.first_roi = first_roi;
  tile.rois = rois;
  if (source.shape.rois > 0) {
    tile.pooled = feature_map_view<S>(pooled, 0, 0);
    tile.pooled_stride = pooled.stride(0);
  }
  return tile;
}

template <typename S>
void forward(
    const RoiGeometry& source,
    const at::Tensor& input,
    const at::Tensor& output) {
  using T = OpMathType<S>;
  const auto& shape = source.shape;
  const ChannelTiling tiling(
      shape.map.count() * shape.groups.count(),
      shape.channels,
      !is_channels_last(input, shape),
      false,
      true,
      {shape.channels, kNarrowestCopy, kCopyBytes, sizeof(S), 0});
  for_each_copy(
      shape,
      tiling,
      [&](int64_t image, int64_t images, int64_t channel, int64_t channels) {
        at::Tensor maps =
            grouped_view(input, shape, image, images, channel, channels);
        if (tiling.copies_input) {
          maps = empty_channels_last(maps, input.scalar_type()).copy_(maps);
        }
        auto tile = make_tile<S>(source, 0, shape.rois, output);
        tile.first_image = image;
        tile.images = images;
        tile.first_channel = channel;
        tile.channels = channels;
        tile.maps = maps_of<const S>(maps);
        pool_bins<S, T>(tile);
      });
}

template <typename S>
void backward(
    const RoiGeometry& source,
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const RoiPoolGradients& gradients) {
  using T = OpMathType<S>;
  constexpr auto kSums = c10::CppTypeToScalarType<T>::value;
  constexpr bool kSumsInDtype = std::is_same_v<S, T>;
  const auto& shape = source.shape;
  const bool wants_input = gradients.input.numel() > 0;
  const bool wants_offset = gradients.offset.numel() > 0;
  const bool deterministic = at::globalContext().deterministicAlgorithms();
  const bool channels_last = is_channels_last(input, shape);
  const ChannelTiling tiling(
      shape.map.count() * shape.groups.count(),
      shape.channels,
      wants_offset && !channels_last,
      wants_input && !(channels_last && kSumsInDtype),
      kSumsInDtype,
      {shape.channels, kNarrowestCopy, kCopyBytes, sizeof(S), sizeof(T)});
  if (wants_input) {
    gradients.input.zero_();
  }
  const int64_t bins = shape.classes * shape.bins.count();
  const int64_t most = std::max<int64_t>(
      kOffsetGradBytes / (bins * int64_t{sizeof(OffsetGrad<T>)}), 1);
  for (int64_t first = 0; first < shape.rois; first += most) {
    const int64_t rois = std::min(most, shape.rois - first);
    at::Tensor offset_grads;
    if (wants_offset) {
      offset_grads = at::zeros({rois, bins, 2}, input.options().dtype(kSums));
    }
    for_each_copy(
        shape,
        tiling,
        [&](int64_t image, int64_t images, int64_t channel, int64_t channels) {
          at::Tensor maps =
              grouped_view(input, shape, image, images, channel, channels);
          if (tiling.copies_input) {
            maps = empty_channels_last(maps, input.scalar_type()).copy_(maps);
          }
          RoiTileGradients<S, T> wanted{};
          at::Tensor grad_maps, sums;
          if (wants_input) {
            grad_maps = grouped_view(
                gradients.input, shape, image, images, channel, channels);
            sums = tiling.copies_grad
                ? empty_channels_last(grad_maps, kSums).zero_()
                : grad_maps;
            wanted.input = maps_of<T>(sums);
          }
          if (wants_offset) {
            wanted.offset_grads = reinterpret_cast<OffsetGrad<T>*>(
                offset_grads.template data_ptr<T>());
          }
          auto tile = make_tile<S>(source, first, rois, grad_output);
          tile.first_image = image;
          tile.images = images;
          tile.first_channel = channel;
          tile.channels = channels;
          tile.maps = maps_of<const S>(maps);
          if (deterministic && wants_input) {
            backward_input_deterministic<S, T>(tile, wanted);
            wanted.input.map.data = nullptr;
          }
          if (wants_offset || !deterministic) {
            backward_bins<S, T>(tile, wanted);
          }
          if (tiling.copies_grad) {
            grad_maps.add_(sums);
          }
        });
    if (wants_offset) {
      sum_offset_grads(
          source,
          first,
          rois,
          reinterpret_cast<const OffsetGrad<T>*>(
              offset_grads.template data_ptr<T>()),
          AnyDtypeView(gradients.offset));
    }
  }
}

struct Device {
  static void forward(
      const RoiGeometry& source,
      const at::Tensor& input,
      const at::Tensor& output) {
    if (source.shape.batch == 0) { // then no box has an image
      output.fill_(std::numeric_limits<double>::quiet_NaN());
      return;
    }
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, input.scalar_type(), "deform_roi_pool", [&] {
          cuda::forward<scalar_t>(source, input, output);
        });
  }

  static void backward(
      const RoiGeometry& source,
      const at::Tensor& grad_output,
      const at::Tensor& input,
      const RoiPoolGradients& gradients) {
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf,
        at::kBFloat16,
        input.scalar_type(),
        "_deform_roi_pool_backward",
        [&] {
          cuda::backward<scalar_t>(source, grad_output, input, gradients);
        });
  }
};

} // namespace
} // namespace dcn::cuda

TORCH_LIBRARY_IMPL(dcn_plugin, CUDA, m) {
  dcn::register_roi_pool<dcn::cuda::Device>(m);
}
