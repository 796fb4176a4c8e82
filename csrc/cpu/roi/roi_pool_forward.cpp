// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Forward pass of RoI pooling. Parallel over RoIs or, with few channels per
// class, over classes and groups of bins.

#include "cpu/roi/roi_pool.h"

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include <ATen/ops/empty.h>

#include "cpu/parallel.h"
#include "cpu/roi/bin_kernels.h"

namespace dcn::cpu {
namespace {

// Budget for copies of feature maps in which the channels of a group are
// contiguous. Larger maps are read in place.
constexpr int64_t kLayoutBytes = int64_t{24} << 20;
constexpr int64_t kMinCopiedChannels = 8;
// RoIs whose boxes are held in memory.
constexpr int64_t kMaxBoxes = 1 << 15;

template <typename S, typename T>
class Forward {
 public:
  Forward(
      const RoiGeometry& geometry,
      const at::Tensor& input,
      const at::Tensor& output)
      : geometry_(geometry),
        shape_(geometry.shape),
        bins_of_groups_(bins_of_groups(geometry)),
        input_(input),
        maps_(geometry.shape, input),
        pooled_(feature_map_view<S>(output, 0, 0)),
        pooled_stride_(output.stride(0)) {}

  void run() {
    const int64_t pixel_bytes =
        shape_.map.count() * shape_.groups.count() * int64_t{sizeof(T)};
    int64_t width = shape_.channels;
    while (width / 2 >= kMinCopiedChannels &&
           width * pixel_bytes > kLayoutBytes) {
      width /= 2;
    }
    const bool reads_in_place = has_few_channels_per_class(shape_) ||
        (std::is_same_v<S, T> && shape_.groups.count() == 1 &&
         input_.stride(1) == 1);
    if (reads_in_place || width * pixel_bytes > kLayoutBytes) {
      run_images<S>(0, shape_.batch, 0, shape_.channels, maps_);
      return;
    }
    const int64_t images = std::clamp<int64_t>(
        kLayoutBytes / (width * pixel_bytes),
        1,
        std::max<int64_t>(shape_.batch, 1));
    copy_ = at::empty(
        {images * shape_.map.count() * shape_.groups.count() * width},
        input_.options().dtype(c10::CppTypeToScalarType<T>::value));
    for (int64_t channel = 0; channel < shape_.channels; channel += width) {
      const int64_t channels = std::min(width, shape_.channels - channel);
      for (int64_t first = 0; first < shape_.batch; first += images) {
        const int64_t count = std::min(images, shape_.batch - first);
        run_copied(first, count, channel, channels);
      }
    }
  }

 private:
  void run_copied(
      int64_t first,
      int64_t count,
      int64_t channel,
      int64_t channels) {
    const auto copied = [&](int64_t image, int group, int64_t from) {
      const int64_t pixel = shape_.groups.count() * channels;
      auto view = channels_last_view(
          copy_.data_ptr<T>() + (image - first) * shape_.map.count() * pixel,
          shape_.map.w,
          pixel);
      view.data += group * channels + from - channel;
      return view;
    };
    const int64_t groups = shape_.groups.count();
    parallel_tasks(count * groups, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = first + task / groups;
        const int group = static_cast<int>(task % groups);
        copy_rows(
            maps_(image, group, channel),
            copied(image, group, channel),
            0,
            shape_.map.h,
            shape_.map.w,
            channels);
      }
    });
    run_images<T>(first, count, channel, channels, [&](auto... place) {
      const auto view = copied(place...);
      return FeatureMapView<const T>{
          view.data, view.channel_stride, view.row_stride, view.column_stride};
    });
  }

  // Pools the RoIs of images [first, first + count). maps(image, group,
  // channel) returns a view.
  template <typename M, typename Maps>
  void run_images(
      int64_t first,
      int64_t count,
      int64_t channel,
      int64_t channels,
      const Maps& maps) {
    for (int64_t roi = 0; roi < shape_.rois; roi += kMaxBoxes) {
      const RoiBoxes<T> boxes(
          geometry_, roi, std::min(roi + kMaxBoxes, shape_.rois));
      const Rois rois{boxes, boxes.of_images(first, count)};
      if (has_few_channels_per_class(shape_)) {
        run_classes<M>(rois, first, count, channel, channels, maps);
      } else {
        run_rois<M>(rois, channel, channels, maps);
      }
    }
  }

  struct Rois {
    const RoiBoxes<T>& boxes;
    std::vector<int64_t> indices;
  };

  struct Workspace {
    SeparableWeights<T> y, x;
    std::vector<T> sums;

    Workspace(const RoiPoolShape& shape, int64_t channels)
        : y(shape.map.h), x(shape.map.w), sums(channels) {}
  };

  // A task is a RoI with all its classes and bins.
  template <typename M, typename Maps>
  void run_rois(
      const Rois& rois,
      int64_t channel,
      int64_t channels,
      const Maps& maps) {
    const int64_t per_class = shape_.channels_per_class();
    const int64_t stop = channel + channels;
    parallel_tasks(rois.indices.size(), [&](int64_t begin, int64_t end) {
      Workspace workspace(shape_, channels);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t roi = rois.indices[task];
        for (int64_t from = channel; from < stop;) {
          const int64_t class_index = from / per_class;
          const int64_t to = std::min((class_index + 1) * per_class, stop);
          for (int group = 0; group < shape_.groups.count(); ++group) {
            for (const BinIndex& bin : bins_of_groups_[group]) {
              pool_bin<M>(
                  rois.boxes[roi], roi, group, bin, from, to, maps, workspace);
            }
          }
          from = to;
        }
      }
    });
  }

  // A task is a class and a group of bins, for all RoIs.
  template <typename M, typename Maps>
  void run_classes(
      const Rois& rois,
      int64_t first_image,
      int64_t images,
      int64_t channel,
      int64_t channels,
      const Maps& maps) {
    const int64_t per_class = shape_.channels_per_class();
    const int64_t first = channel / per_class;
    const int64_t classes = (channel + channels - 1) / per_class + 1 - first;
    const int64_t groups = shape_.groups.count();
    parallel_tasks(classes * groups, [&](int64_t begin, int64_t end) {
      Workspace workspace(shape_, per_class);
      BinBatch<T> batch;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t class_index = first + task / groups;
        const int group = static_cast<int>(task % groups);
        const int64_t from = std::max(class_index * per_class, channel);
        const int64_t to =
            std::min((class_index + 1) * per_class, channel + channels);
        FiniteMapCache<M> finite(first_image, images, shape_.map, to - from);
        for (const BinIndex& index : bins_of_groups_[group]) {
          for (const int64_t roi : rois.indices) {
            const auto& roi_box = rois.boxes[roi];
            const auto bin = geometry_.locate(roi_box, roi, class_index, index);
            if (!finite(bin.image, maps(bin.image, group, from)) ||
                !batch.try_add(roi, bin)) {
              pool_bin<M>(
                  roi_box, roi, group, index, from, to, maps, workspace);
            } else if (batch.full()) {
              pool_batch<M>(batch, group, index, from, to, maps);
            }
          }
          pool_batch<M>(batch, group, index, from, to, maps);
        }
      }
    });
  }

  // Pools the bins of a batch, and empties it.
  template <typename M, typename Maps>
  void pool_batch(
      BinBatch<T>& batch,
      int group,
      const BinIndex& index,
      int64_t from,
      int64_t to,
      const Maps& maps) {
    batch.compute_samples(shape_);
    for (int item = 0; item < batch.size; ++item) {
      const T divisor = batch.divisor(shape_.mode, item);
      S* out = pooled_.pixel(index.i, index.j) +
          batch.roi[item] * pooled_stride_ + from * pooled_.channel_stride;
      for (int64_t c = from; c < to; ++c) {
        const FeatureMapView<const M> map = maps(batch.image[item], group, c);
        *out = static_cast<S>(
            divisor > T(0) ? pool_batched<M>(map, batch, item) / divisor
                           : T(0));
        out += pooled_.channel_stride;
      }
    }
    batch.size = 0;
  }

  // Pools output channels [from, to), all of one class, of one bin.
  template <typename M, typename Maps>
  void pool_bin(
      const RoiBox<T>& roi_box,
      int64_t roi,
      int group,
      const BinIndex& index,
      int64_t from,
      int64_t to,
      const Maps& maps,
      Workspace& workspace) {
    const int64_t class_index = from / shape_.channels_per_class();
    const auto bin = geometry_.locate(roi_box, roi, class_index, index);
    auto& [y, x, sums] = workspace;
    T divisor = 0;
    T empty_value = 0;
    if (bin.state == RoiState::kInside) {
      y.accumulate(bin.y);
      x.accumulate(bin.x);
      divisor = bin_divisor(bin.y, bin.x, y.kept, x.kept);
    } else if (bin.state == RoiState::kNan) {
      empty_value = std::numeric_limits<T>::quiet_NaN();
    }
    if (divisor > T(0)) {
      const auto map = maps(bin.image, group, from);
      if (to - from < kMinVectorChannels) {
        pool_per_channel<M, T>(map, y, x, to - from, sums.data());
      } else {
        pool_vectorized<M, T>(map, y, x, to - from, sums.data());
      }
    }
    S* out = pooled_.pixel(index.i, index.j) + roi * pooled_stride_ +
        from * pooled_.channel_stride;
    for (int64_t c = 0; c < to - from; ++c) {
      out[c * pooled_.channel_stride] =
          static_cast<S>(divisor > T(0) ? sums[c] / divisor : empty_value);
    }
  }

  const RoiGeometry& geometry_;
  const RoiPoolShape& shape_;
  const std::vector<std::vector<BinIndex>> bins_of_groups_;
  const at::Tensor& input_;
  const GroupedMaps<const S> maps_;
  const FeatureMapView<S> pooled_; // of RoI 0
  const int64_t pooled_stride_; // from RoI to RoI
  at::Tensor copy_; // (images, H, W, groups, channels)
};

} // namespace

template <typename S, typename T>
void roi_pool_forward(
    const RoiGeometry& geometry,
    const at::Tensor& input,
    const at::Tensor& output) {
  Forward<S, T>(geometry, input, output).run();
}

#define DCN_INSTANTIATE_FORWARD(S, T)   \
  template void roi_pool_forward<S, T>( \
      const RoiGeometry&, const at::Tensor&, const at::Tensor&);

DCN_INSTANTIATE_FORWARD(double, double)
DCN_INSTANTIATE_FORWARD(float, float)
DCN_INSTANTIATE_FORWARD(c10::Half, float)
DCN_INSTANTIATE_FORWARD(c10::BFloat16, float)
#undef DCN_INSTANTIATE_FORWARD

} // namespace dcn::cpu
