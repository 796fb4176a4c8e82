// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Host side of RoI pooling on CUDA: slices, copies and registration.

#include <limits>

#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "cuda/launch.cuh"
#include "cuda/roi/roi_bins.cuh"
#include "cuda/workspace.cuh"
#include "ops/backward_tiling.h"
#include "ops/roi_pool_op.h"

namespace dcn::cuda {
namespace {

// Slices with fewer channels are not copied.
constexpr int64_t kMinCopiedChannels = 16;
// Budget for the offset gradients per bin of a range of RoIs.
constexpr int64_t kBinBytes = int64_t{32} << 20;

// View of channels [channel, channel + channels) of every group, of some
// images: (images, channels, groups, H, W).
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

// Allocates the same shape, with the channels of a group contiguous in memory.
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

// Calls visit(first image, images, first channel, channels) for slices of
// channels and ranges of images whose copies fit the budget.
template <typename Visit>
void for_each_copy(
    const RoiPoolShape& shape,
    const ChannelTiling& tiling,
    const Visit& visit) {
  const int64_t images = std::max<int64_t>(
      kCopyBytes / std::max<int64_t>(tiling.copy_bytes, 1), 1);
  for (int64_t channel = 0; channel < shape.channels;
       channel += tiling.slice_channels) {
    for (int64_t image = 0; image < shape.batch; image += images) {
      visit(
          image,
          std::min(images, shape.batch - image),
          channel,
          std::min(tiling.slice_channels, shape.channels - channel));
    }
  }
}

template <typename S>
RoiTile<S, OpMathType<S>> make_tile(
    const RoiGeometry& geometry,
    int64_t first_roi,
    int64_t rois,
    const at::Tensor& pooled) {
  RoiTile<S, OpMathType<S>> tile{};
  tile.geometry = geometry;
  tile.first_roi = first_roi;
  tile.rois = rois;
  if (geometry.shape.rois > 0) {
    tile.pooled = feature_map_view<S>(pooled, 0, 0);
    tile.pooled_stride = pooled.stride(0);
  }
  return tile;
}

template <typename S>
void forward(
    const RoiGeometry& geometry,
    const at::Tensor& input,
    const at::Tensor& output) {
  using T = OpMathType<S>;
  const auto& shape = geometry.shape;
  const ChannelTiling tiling(
      shape.map.count() * shape.groups.count(),
      shape.channels,
      !is_channels_last(input, shape),
      false,
      true,
      {shape.channels, kMinCopiedChannels, kCopyBytes, sizeof(S), 0});
  for_each_copy(
      shape,
      tiling,
      [&](int64_t image, int64_t images, int64_t channel, int64_t channels) {
        at::Tensor maps =
            grouped_view(input, shape, image, images, channel, channels);
        if (tiling.copies_input) {
          maps = empty_channels_last(maps, input.scalar_type()).copy_(maps);
        }
        auto tile = make_tile<S>(geometry, 0, shape.rois, output);
        tile.first_image = image;
        tile.images = images;
        tile.first_channel = channel;
        tile.channels = channels;
        tile.maps = maps_of<const S>(maps);
        pool_bins<S, T>(tile);
      });
}

// The arguments of the backward pass.
struct BackwardArguments {
  const RoiGeometry& geometry;
  const at::Tensor& grad_output;
  const at::Tensor& input;
  const RoiPoolGradients& gradients;
};

// Adds the contributions of a range of RoIs to the gradient of the input, if it
// is wanted, and to `offset_grads` unless it is null.
template <typename S, typename T>
void backward_rois(
    const BackwardArguments& arguments,
    int64_t first,
    int64_t rois,
    bool wants_input,
    OffsetGrad<T>* offset_grads) {
  constexpr bool kAccumulatesInDtype = std::is_same_v<S, T>;
  const auto& shape = arguments.geometry.shape;
  const at::Tensor& input = arguments.input;
  const bool channels_last = is_channels_last(input, shape);
  const ChannelTiling tiling(
      shape.map.count() * shape.groups.count(),
      shape.channels,
      offset_grads != nullptr && !channels_last,
      wants_input && !(channels_last && kAccumulatesInDtype),
      kAccumulatesInDtype,
      {shape.channels, kMinCopiedChannels, kCopyBytes, sizeof(S), sizeof(T)});
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
        wanted.offset_grads = offset_grads;
        at::Tensor grad_maps, sums;
        if (wants_input) {
          grad_maps = grouped_view(
              arguments.gradients.input,
              shape,
              image,
              images,
              channel,
              channels);
          sums = tiling.copies_grad
              ? empty_channels_last(
                    grad_maps, c10::CppTypeToScalarType<T>::value)
                    .zero_()
              : grad_maps;
          wanted.input = maps_of<T>(sums);
        }
        auto tile = make_tile<S>(
            arguments.geometry, first, rois, arguments.grad_output);
        tile.first_image = image;
        tile.images = images;
        tile.first_channel = channel;
        tile.channels = channels;
        tile.maps = maps_of<const S>(maps);
        if (wants_input && at::globalContext().deterministicAlgorithms()) {
          backward_input_deterministic<S, T>(tile, wanted, input.options());
        } else {
          backward_bins<S, T>(tile, wanted);
        }
        if (tiling.copies_grad) {
          grad_maps.add_(sums);
        }
      });
}

template <typename S>
void backward(const BackwardArguments& arguments) {
  using T = OpMathType<S>;
  const auto& shape = arguments.geometry.shape;
  const auto& gradients = arguments.gradients;
  const bool wants_input = gradients.input.numel() > 0;
  const bool wants_offset = gradients.offset.numel() > 0;
  const int64_t bins = shape.classes * shape.bins.count();
  const int64_t max_rois =
      std::max<int64_t>(kBinBytes / (bins * int64_t{sizeof(OffsetGrad<T>)}), 1);
  // With several ranges, the gradient of the input would be rounded to S after
  // each of them.
  const bool together = wants_input && wants_offset && shape.rois <= max_rois &&
      !at::globalContext().deterministicAlgorithms();
  if (wants_input) {
    gradients.input.zero_();
  }
  if (wants_input && !together) {
    backward_rois<S, T>(arguments, 0, shape.rois, true, nullptr);
  }
  for (int64_t first = 0; wants_offset && first < shape.rois;
       first += max_rois) {
    const int64_t rois = std::min(max_rois, shape.rois - first);
    const at::Tensor sums = at::zeros(
        {rois, bins, 2},
        arguments.input.options().dtype(c10::CppTypeToScalarType<T>::value));
    auto* offset_grads =
        reinterpret_cast<OffsetGrad<T>*>(sums.template data_ptr<T>());
    backward_rois<S, T>(arguments, first, rois, together, offset_grads);
    sum_offset_grads<T>(
        arguments.geometry,
        first,
        rois,
        offset_grads,
        AnyDtypeView(gradients.offset));
  }
}

struct Device {
  static constexpr bool kChecksBatchIndices = false;

  static void forward(
      const RoiGeometry& geometry,
      const at::Tensor& input,
      const at::Tensor& output) {
    if (geometry.shape.batch == 0) { // all batch indices are invalid
      output.fill_(std::numeric_limits<double>::quiet_NaN());
      return;
    }
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, input.scalar_type(), "deform_roi_pool", [&] {
          cuda::forward<scalar_t>(geometry, input, output);
        });
  }

  static void backward(
      const RoiGeometry& geometry,
      const at::Tensor& grad_output,
      const at::Tensor& input,
      const RoiPoolGradients& gradients) {
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf,
        at::kBFloat16,
        input.scalar_type(),
        "_deform_roi_pool_backward",
        [&] {
          cuda::backward<scalar_t>({geometry, grad_output, input, gradients});
        });
  }
};

} // namespace
} // namespace dcn::cuda

TORCH_LIBRARY_IMPL(dcn_plugin, DCN_CUDA_DISPATCH_KEY, m) {
  dcn::register_roi_pool<dcn::cuda::Device>(m);
}
