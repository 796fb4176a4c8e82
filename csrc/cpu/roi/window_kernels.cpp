// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

#include "cpu/roi/window_kernels.h"

#include <algorithm>

#include "cpu/vector.h"

namespace dcn::cpu {
namespace {

template <typename T>
using RowVector = typename VectorOf<T, kWindow>::Type;

// A vector loaded at kOneAtLane + kWindow - 1 - lane is 1 at this lane, else 0.
template <typename T>
constexpr T kOneAtLane[2 * kWindow - 1] =
    {0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0};

template <RoiMode kMode, typename T>
DCN_INLINE void compute_axis_samples(
    const RoiBinsAxis<T>& bins,
    int bin,
    int64_t first,
    int size,
    BinBatchAxis<T>& axis) {
  const int64_t from = bin * int64_t(bins.offset_scale.size()) + first;
  const T* first_position = bins.first_position.data() + from;
  const T* step = bins.step.data() + from;
  std::copy_n(bins.count.data() + from, size, axis.count);
  std::copy_n(bins.offset_scale.data() + first, size, axis.offset_scale);
  std::fill_n(axis.kept, size, T(0));
  std::fill_n(axis.begin, size, bins.extent);
  std::fill_n(axis.end, size, 0);
  const T max_count = *std::max_element(axis.count, axis.count + size);
  for (int i = 0; i < static_cast<int>(max_count); ++i) {
#pragma omp simd
    for (int item = 0; item < size; ++item) {
      const T position = first_position[item] +
          axis.offset[item] * axis.offset_scale[item] +
          static_cast<T>(i) * step[item];
      const auto sample = sample_at<kMode>(position, bins.extent);
      const int low = sample.tap.pixel[0], high = sample.tap.pixel[1];
      axis.pixel[0][i][item] = low;
      axis.pixel[1][i][item] = high;
      axis.weight[0][i][item] = sample.tap.weight[0];
      axis.weight[1][i][item] = sample.tap.weight[1];
      axis.dweight[0][i][item] = sample.tap.dweight[0];
      axis.dweight[1][i][item] = sample.tap.dweight[1];
      const bool counts = sample.kept & (static_cast<T>(i) < axis.count[item]);
      const int begin = axis.begin[item], end = axis.end[item];
      axis.kept[item] += counts ? T(1) : T(0);
      axis.begin[item] = counts & (low < begin) ? low : begin;
      axis.end[item] = counts & (high >= end) ? high + 1 : end;
    }
  }
}

template <RoiMode kMode, typename T>
DCN_INLINE void compute_batch_samples(
    const BatchedRois<T>& located,
    int64_t first,
    const BinIndex& index,
    BinBatch<T>& batch) {
  auto& y = batch.y;
  auto& x = batch.x;
  compute_axis_samples<kMode>(located.y, index.i, first, batch.size, y);
  compute_axis_samples<kMode>(located.x, index.j, first, batch.size, x);
  for (int item = 0; item < batch.size; ++item) {
    batch.divisor[item] = bin_divisor(
        kMode, y.count[item], x.count[item], y.kept[item], x.kept[item]);
    batch.fits[item] = x.end[item] - x.begin[item] <= kWindow &&
        y.offset[item] == y.offset[item] && x.offset[item] == x.offset[item];
  }
}

template <typename T>
DCN_INLINE void compute_batch_samples(
    RoiMode mode,
    const BatchedRois<T>& located,
    int64_t first,
    const BinIndex& index,
    BinBatch<T>& batch) {
  switch (mode) {
    case RoiMode::kBin:
      compute_batch_samples<RoiMode::kBin>(located, first, index, batch);
      break;
    case RoiMode::kMsra:
      compute_batch_samples<RoiMode::kMsra>(located, first, index, batch);
      break;
    default:
      compute_batch_samples<RoiMode::kAlign>(located, first, index, batch);
  }
}

// The weights of the columns of a window, summed over samples.
template <typename T>
struct WindowWeights {
  RowVector<T> weight{};
  RowVector<T> dweight{};
};

template <typename T>
DCN_INLINE WindowWeights<T> window_weights(const BinBatchAxis<T>& x, int item) {
  WindowWeights<T> window;
  for (int i = 0; i < static_cast<int>(x.count[item]); ++i) {
    for (int k = 0; k < 2; ++k) {
      // Skipped samples may lie outside the window; their weights are 0.
      const int lane = (x.pixel[k][i][item] - x.begin[item]) & (kWindow - 1);
      const auto one_at_lane =
          load_vector<T, kWindow>(kOneAtLane<T> + kWindow - 1 - lane);
      window.weight += x.weight[k][i][item] * one_at_lane;
      window.dweight += x.dweight[k][i][item] * one_at_lane;
    }
  }
  return window;
}

template <typename T>
DCN_INLINE void pool_batch_body(
    const FeatureMapView<const T>& map,
    const BinBatch<T>& batch,
    T* sums) {
  const auto& y = batch.y;
  for (int item = 0; item < batch.size; ++item) {
    sums[item] = 0;
    if (!batch.fits[item] || batch.divisor[item] == T(0)) {
      continue;
    }
    const auto x = window_weights(batch.x, item);
    RowVector<T> sum{};
    for (int i = 0; i < static_cast<int>(y.count[item]); ++i) {
      for (int k = 0; k < 2; ++k) {
        const int row = y.pixel[k][i][item];
        sum += y.weight[k][i][item] *
            load_vector<T, kWindow>(map.pixel(row, batch.x.begin[item]));
      }
    }
    sums[item] = sum_of<T, kWindow>(sum * x.weight) / batch.divisor[item];
  }
}

template <typename T>
DCN_INLINE void backward_batch_body(
    const FeatureMapView<const T>& map,
    const BinBatch<T>& batch,
    const T* gradient,
    bool wants_offset,
    const FeatureMapView<T>& input,
    BatchOffsetGrad<T>& offset_grad) {
  const auto& y = batch.y;
  for (int item = 0; item < batch.size; ++item) {
    if (!batch.fits[item] || batch.divisor[item] == T(0)) {
      continue;
    }
    const auto x = window_weights(batch.x, item);
    const T scale = gradient[item] / batch.divisor[item];
    const RowVector<T> added = scale * x.weight;
    RowVector<T> sum{}, dsum{};
    for (int i = 0; i < static_cast<int>(y.count[item]); ++i) {
      for (int k = 0; k < 2; ++k) {
        const int row = y.pixel[k][i][item];
        const T weight = y.weight[k][i][item];
        if (wants_offset) {
          const auto pixels =
              load_vector<T, kWindow>(map.pixel(row, batch.x.begin[item]));
          sum += weight * pixels;
          dsum += y.dweight[k][i][item] * pixels;
        }
        if (input.data != nullptr) {
          T* to = input.pixel(row, batch.x.begin[item]);
          store_vector<T, kWindow>(
              load_vector<T, kWindow>(to) + weight * added, to);
        }
      }
    }
    offset_grad.y[item] +=
        y.offset_scale[item] * scale * sum_of<T, kWindow>(dsum * x.weight);
    offset_grad.x[item] += batch.x.offset_scale[item] * scale *
        sum_of<T, kWindow>(sum * x.dweight);
  }
}

template <typename T>
DCN_INLINE bool are_finite_body(const T* values, int64_t count) {
  T sum = 0; // 0, or NaN if any value is not finite
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    sum += T(0) * values[i];
  }
  return sum == T(0);
}

} // namespace

template <typename T>
BatchedRois<T>::BatchedRois(
    const RoiPoolShape& shape,
    const RoiBoxes<T>& boxes,
    const std::vector<int64_t>& rois_of_image) {
  y.extent = shape.map.h;
  x.extent = shape.map.w;
  const auto bin_of = [&](const RoiAxis<T>& roi, int index, int bins) {
    return make_bin_axis(shape.mode, 0, roi, index, bins, T(0));
  };
  const auto has_few_samples = [&](const RoiAxis<T>& roi, int bins) {
    T count = 0;
    for (int index = 0; index < bins; ++index) {
      count = std::max(count, bin_of(roi, index, bins).count);
    }
    return count <= T(kMaxSamples);
  };
  for (const int64_t roi : rois_of_image) {
    const auto& box = boxes[roi];
    const bool may_be_batched = box.state == RoiState::kInside &&
        has_few_samples(box.y, shape.bins.h) &&
        has_few_samples(box.x, shape.bins.w);
    (may_be_batched ? rois : others).push_back(roi);
  }
  const auto locate = [&](auto axis, int bins, RoiBinsAxis<T>& located) {
    for (const int64_t roi : rois) {
      located.offset_scale.push_back(
          static_cast<T>(shape.gamma) * (boxes[roi].*axis).size);
    }
    for (int index = 0; index < bins; ++index) {
      for (const int64_t roi : rois) {
        const auto bin = bin_of(boxes[roi].*axis, index, bins);
        located.first_position.push_back(bin.first_position);
        located.step.push_back(bin.step);
        located.count.push_back(bin.count);
      }
    }
  };
  locate(&RoiBox<T>::y, shape.bins.h, y);
  locate(&RoiBox<T>::x, shape.bins.w, x);
}

template struct BatchedRois<float>;
template struct BatchedRois<double>;

template <typename T>
void BinBatch<T>::locate(
    const RoiGeometry& geometry,
    const BatchedRois<T>& located,
    int64_t first,
    int64_t class_index,
    const BinIndex& index) {
  const int64_t left = static_cast<int64_t>(located.rois.size()) - first;
  rois = located.rois.data() + first;
  size = static_cast<int>(std::min<int64_t>(kBatchSize, left));
  for (int item = 0; item < size; ++item) {
    x.offset[item] = geometry.offset_of<T>(rois[item], class_index, 0, index);
    y.offset[item] = geometry.offset_of<T>(rois[item], class_index, 1, index);
  }
  compute_samples(geometry.shape.mode, located, first, index);
}

#define DCN_DEFINE_BATCH(T)                                                    \
  template <>                                                                  \
  DCN_VECTOR_CLONES bool are_finite(const T* values, int64_t count) {          \
    return are_finite_body(values, count);                                     \
  }                                                                            \
  template <>                                                                  \
  DCN_VECTOR_CLONES void BinBatch<T>::compute_samples(                         \
      RoiMode mode,                                                            \
      const BatchedRois<T>& located,                                           \
      int64_t first,                                                           \
      const BinIndex& index) {                                                 \
    compute_batch_samples(mode, located, first, index, *this);                 \
  }                                                                            \
  template <>                                                                  \
  DCN_VECTOR_CLONES void pool_batch(                                           \
      const FeatureMapView<const T>& map, const BinBatch<T>& batch, T* sums) { \
    pool_batch_body(map, batch, sums);                                         \
  }                                                                            \
  template <>                                                                  \
  DCN_VECTOR_CLONES void backward_batch(                                       \
      const FeatureMapView<const T>& map,                                      \
      const BinBatch<T>& batch,                                                \
      const T* gradient,                                                       \
      bool wants_offset,                                                       \
      const FeatureMapView<T>& input,                                          \
      BatchOffsetGrad<T>& offset_grad) {                                       \
    backward_batch_body(                                                       \
        map, batch, gradient, wants_offset, input, offset_grad);               \
  }                                                                            \
  template void BinBatch<T>::locate(                                           \
      const RoiGeometry&,                                                      \
      const BatchedRois<T>&,                                                   \
      int64_t,                                                                 \
      int64_t,                                                                 \
      const BinIndex&);

DCN_DEFINE_BATCH(double)
DCN_DEFINE_BATCH(float)
#undef DCN_DEFINE_BATCH

} // namespace dcn::cpu
