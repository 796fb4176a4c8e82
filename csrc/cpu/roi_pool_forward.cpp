// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include <algorithm>
#include <type_traits>
#include <vector>

#include <ATen/ops/empty.h>

#include "cpu/parallel.h"
#include "cpu/roi_pixels.h"
#include "cpu/roi_pool.h"

namespace dcn {
namespace {

// Copies of maps in which the channels of a group are neighbours; larger maps
// are read where they are.
constexpr int64_t kLayoutBytes = int64_t{24} << 20;
constexpr int64_t kNarrowestCopy = 8;

template <typename S, typename T>
class Forward {
 public:
  Forward(
      const RoiSource& source,
      const at::Tensor& input,
      const at::Tensor& output)
      : source_(source), shape_(source.shape), input_(input), output_(output) {}

  void run() {
    const int64_t pixel_bytes =
        shape_.map.count() * shape_.groups.count() * int64_t{sizeof(T)};
    int64_t width = shape_.channels;
    while (width / 2 >= kNarrowestCopy && width * pixel_bytes > kLayoutBytes) {
      width /= 2;
    }
    const bool readable = std::is_same_v<S, T> && shape_.groups.count() == 1 &&
        input_.stride(1) == 1;
    if (readable || width * pixel_bytes > kLayoutBytes) {
      run_images<S>(0, shape_.batch, 0, shape_.channels, [&](auto... place) {
        return group_view<const S>(shape_, input_, place...);
      });
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
            group_view<const S>(shape_, input_, image, group, channel),
            copied(image, group, channel),
            0,
            shape_.map.h,
            shape_.map.w,
            channels);
      }
    });
    run_images<T>(first, count, channel, channels, [&](auto... place) {
      const auto view = copied(place...);
      return MapView<const T>{
          view.data, view.channel_stride, view.row_stride, view.column_stride};
    });
  }

  // Pools the RoIs of images [first, first + count); maps(image, group,
  // channel) is a view.
  template <typename M, typename Maps>
  void run_images(
      int64_t first,
      int64_t count,
      int64_t channel,
      int64_t channels,
      const Maps& maps) {
    std::vector<int64_t> rois;
    for (int64_t roi = 0; roi < shape_.rois; ++roi) {
      const int64_t image = source_.image_of(roi);
      if (image >= first && image < first + count) {
        rois.push_back(roi);
      }
    }
    parallel_tasks(rois.size(), [&](int64_t begin, int64_t end) {
      AxisWeights<T> y(shape_.map.h), x(shape_.map.w);
      std::vector<T> sums(channels);
      for (int64_t i = begin; i < end; ++i) {
        pool_roi<M>(rois[i], channel, channels, maps, y, x, sums.data());
      }
    });
  }

  template <typename M, typename Maps>
  void pool_roi(
      int64_t roi,
      int64_t channel,
      int64_t channels,
      const Maps& maps,
      AxisWeights<T>& y,
      AxisWeights<T>& x,
      T* sums) {
    const int64_t per_class = shape_.channels_per_class();
    const int64_t stop = channel + channels;
    const auto output = map_view<S>(output_, roi, 0);
    for (int64_t from = channel; from < stop;) {
      const int64_t of_class = from / per_class;
      const int64_t to = std::min((of_class + 1) * per_class, stop);
      for (int i = 0; i < shape_.bins.h; ++i) {
        for (int j = 0; j < shape_.bins.w; ++j) {
          const auto bin = source_.locate<T>(roi, of_class, i, j);
          T divisor = 0;
          T nothing = 0;
          if (bin.state == RoiState::kInside) {
            y.sum(bin.y);
            x.sum(bin.x);
            divisor = bin_divisor(bin.y, bin.x, y.kept, x.kept);
          } else if (bin.state == RoiState::kNan) {
            nothing = std::numeric_limits<T>::quiet_NaN();
          }
          if (divisor > T(0)) {
            pool_pixels<M, T>(
                maps(bin.image, shape_.group_of(i, j), from),
                y,
                x,
                to - from,
                sums);
          }
          S* out = output.pixel(i, j) + from * output.channel_stride;
          for (int64_t c = 0; c < to - from; ++c) {
            out[c * output.channel_stride] =
                static_cast<S>(divisor > T(0) ? sums[c] / divisor : nothing);
          }
        }
      }
      from = to;
    }
  }

  const RoiSource& source_;
  const RoiPoolShape& shape_;
  const at::Tensor& input_;
  const at::Tensor& output_;
  at::Tensor copy_; // (images, H, W, groups, channels)
};

} // namespace

template <typename S, typename T>
void roi_pool_forward(
    const RoiSource& source,
    const at::Tensor& input,
    const at::Tensor& output) {
  Forward<S, T>(source, input, output).run();
}

#define DCN_INSTANTIATE_FORWARD(S, T)   \
  template void roi_pool_forward<S, T>( \
      const RoiSource&, const at::Tensor&, const at::Tensor&);

DCN_INSTANTIATE_FORWARD(double, double)
DCN_INSTANTIATE_FORWARD(float, float)
DCN_INSTANTIATE_FORWARD(c10::Half, float)
DCN_INSTANTIATE_FORWARD(c10::BFloat16, float)
#undef DCN_INSTANTIATE_FORWARD

} // namespace dcn
