// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Forward pass of RoI pooling. Parallel over RoIs or, with few channels per
// class, over classes and groups of bins.

#include "cpu/roi/roi_pool.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include <ATen/ops/empty.h>

#include "cpu/parallel.h"
#include "cpu/roi/bin_kernels.h"
#include "cpu/roi/window_kernels.h"

namespace dcn::cpu {
namespace {

// Budget for copies of feature maps in which the channels of a group are
// contiguous. Larger maps are read in place.
constexpr int64_t kLayoutBytes = int64_t{24} << 20;
constexpr int64_t kMinCopiedChannels = 8;
// Budget for the planes of one class. Larger maps are read in place.
constexpr int64_t kMaxWindowBytes = int64_t{8} << 20;
// RoIs whose boxes and bins are held in memory.
constexpr int64_t kMaxBoxes = 1 << 12;

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
    if (has_few_channels_per_class(shape_) &&
        window_bytes() <= kMaxWindowBytes) {
      run_classes();
      return;
    }
    const int64_t pixel_bytes =
        shape_.map.count() * shape_.groups.count() * int64_t{sizeof(T)};
    int64_t width = shape_.channels;
    while (width / 2 >= kMinCopiedChannels &&
           width * pixel_bytes > kLayoutBytes) {
      width /= 2;
    }
    const bool reads_in_place = std::is_same_v<S, T> &&
        shape_.groups.count() == 1 && input_.stride(1) == 1;
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
      run_rois<M>(rois, channel, channels, maps);
    }
  }

  struct Rois {
    const RoiBoxes<T>& boxes;
    std::vector<int64_t> indices;
  };

  struct Workspace {
    SeparableWeights<T> y, x;
    std::vector<T> sums;
    BinBatch<T> batch;

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

  // Pools few channels per class. A task is a class and a group of bins.
  void run_classes() {
    const int64_t groups = shape_.groups.count();
    const int64_t tasks = shape_.classes * groups;
    const int64_t workers = std::min(
        tasks,
        std::clamp<int64_t>(
            kLayoutBytes / window_bytes(), 1, at::get_num_threads()));
    for (int64_t roi = 0; roi < shape_.rois; roi += kMaxBoxes) {
      const RoiBoxes<T> boxes(
          geometry_, roi, std::min(roi + kMaxBoxes, shape_.rois));
      for (int64_t image = 0; image < shape_.batch; ++image) {
        const auto rois_of_image = boxes.of_images(image, 1);
        if (rois_of_image.empty()) {
          continue;
        }
        const BatchedRois<T> rois(shape_, boxes, rois_of_image);
        parallel_tasks(workers, [&](int64_t begin, int64_t end) {
          Workspace workspace(shape_, shape_.channels_per_class());
          const std::unique_ptr<T[]> planes(
              new T[window_bytes() / sizeof(T)]());
          for (int64_t task = begin * tasks / workers;
               task < end * tasks / workers;
               ++task) {
            const int group = static_cast<int>(task % groups);
            run_class(
                {boxes, rois, image, task / groups, group},
                planes.get(),
                workspace);
          }
        });
      }
    }
  }

  struct ClassTask {
    const RoiBoxes<T>& boxes;
    const BatchedRois<T>& rois;
    int64_t image;
    int64_t class_index;
    int group;
  };

  void run_class(const ClassTask& task, T* planes, Workspace& workspace) {
    const int64_t channels = shape_.channels_per_class();
    const int64_t channel = task.class_index * channels;
    const auto copy = window_planes_view(planes, shape_.map);
    copy_planes(
        maps_(task.image, task.group, channel), copy, channels, shape_.map);
    const bool finite =
        are_finite<T>(planes, window_planes_size(shape_.map, channels));
    const auto map = const_view(copy);
    const auto& rois = task.rois.rois;
    for (const BinIndex& index : bins_of_groups_[task.group]) {
      const auto pool = [&](int64_t roi) {
        pool_bin<T>(
            task.boxes[roi],
            roi,
            task.group,
            index,
            channel,
            channel + channels,
            [&](auto...) { return map; },
            workspace);
      };
      std::for_each(task.rois.others.begin(), task.rois.others.end(), pool);
      if (!finite) {
        std::for_each(rois.begin(), rois.end(), pool);
        continue;
      }
      auto& batch = workspace.batch;
      for (size_t first = 0; first < rois.size(); first += kBatchSize) {
        batch.locate(geometry_, task.rois, first, task.class_index, index);
        pool_batched(map, batch, index, channel);
        for (int item = 0; item < batch.size; ++item) {
          if (!batch.fits[item]) {
            pool(batch.rois[item]);
          }
        }
      }
    }
  }

  // Pools output channels from `channel` on, all of one class; `map` begins
  // there.
  void pool_batched(
      FeatureMapView<const T> map,
      const BinBatch<T>& batch,
      const BinIndex& index,
      int64_t channel) {
    S* out = pooled_.pixel(index.i, index.j) + channel * pooled_.channel_stride;
    for (int64_t c = 0; c < shape_.channels_per_class(); ++c) {
      T sums[kBatchSize];
      pool_batch<T>(map, batch, sums);
      for (int item = 0; item < batch.size; ++item) {
        out[batch.rois[item] * pooled_stride_] = static_cast<S>(sums[item]);
      }
      map.data += map.channel_stride;
      out += pooled_.channel_stride;
    }
  }

  int64_t window_bytes() const {
    return window_planes_size(shape_.map, shape_.channels_per_class()) *
        int64_t{sizeof(T)};
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
    auto& y = workspace.y;
    auto& x = workspace.x;
    auto& sums = workspace.sums;
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
