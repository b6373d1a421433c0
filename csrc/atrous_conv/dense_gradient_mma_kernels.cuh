// SPDX-License-Identifier: Apache-2.0
// The gradient of a dense convolution's weight on tensor cores: for every tap a product of the
// output's gradient and of the picture over the pixels where the tap meets the picture. A block has
// 128 outputs and 32 channels for every warp.
#pragma once

#include "atrous_conv/dense_mma_kernels.cuh"

namespace pydense {

// Strides are in elements; outputs, and channels, lie side by side, in whole vectors.
template <class T>
struct DenseGradientParams {
  const T* grad;
  int64_t grad_batch;
  int64_t grad_row;
  int64_t grad_pixel;
  const T* x;
  int64_t x_batch;
  int64_t x_row;
  int64_t x_pixel;
  int32_t batches;
  int32_t outputs;  // with those that fill vectors
  int32_t channels;
  int32_t height;
  int32_t width;
  int32_t out_height;
  int32_t out_width;
  int32_t taps;
  int32_t kernel_width;
  int32_t dilation_y;
  int32_t dilation_x;
  int32_t top;
  int32_t left;
  uint32_t output_tiles;
  uint32_t channel_tiles;
  int32_t splits;
  float* parts;  // [splits, taps, outputs, channels]
};

template <class T, int kWarps>
class DenseGradientMma {
  static constexpr int kVector = kDenseVector<T>;
  static constexpr int kDepth = kDenseDepth<T>;  // pixels of a step
  static constexpr int kStages = 4;
  static constexpr int kRows = kDenseRows;
  static constexpr int kColumns = kWarps * kDenseColumns;
  static constexpr int kStage = (kRows + kColumns) * kDepth;
  static constexpr int kGroups = kRows / kDenseGroup;

 public:
  static constexpr int kThreads = kWarps * 32;
  // Where the pixels of a step are; the former is negative for none.
  struct Place {
    int64_t grad;
    int64_t x;
  };
  static constexpr int kPlaces = kStages * kDepth;
  // Of shared memory.
  static constexpr int kBytes =
      kStages * kStage * static_cast<int>(sizeof(T)) + kPlaces * static_cast<int>(sizeof(Place));

  __device__ __forceinline__ DenseGradientMma(const DenseGradientParams<T>& p, Place* places,
                                              T* shared)
      : p_(p), places_(places), shared_(shared) {
    uint32_t item = blockIdx.x;
    channel_ = static_cast<int32_t>(item % p.channel_tiles) * kColumns;
    item /= p.channel_tiles;
    output_ = static_cast<int32_t>(item % p.output_tiles) * kRows;
    item /= p.output_tiles;
    split_ = static_cast<int32_t>(item % static_cast<uint32_t>(p.splits));
    tap_ = static_cast<int32_t>(item / static_cast<uint32_t>(p.splits));
    rows_ = min(p.outputs - output_, kRows);
    shift_y_ = tap_ / p.kernel_width * p.dilation_y - p.top;
    shift_x_ = tap_ % p.kernel_width * p.dilation_x - p.left;
    y_ = max(0, -shift_y_);
    x_ = max(0, -shift_x_);
    height_ = static_cast<uint32_t>(max(0, min(p.out_height, p.height - shift_y_) - y_));
    width_ = static_cast<uint32_t>(max(0, min(p.out_width, p.width - shift_x_) - x_));
    pixels_ = static_cast<uint32_t>(p.batches) * height_ * width_;
  }

  __device__ __forceinline__ void run() {
    const auto all = static_cast<int>((pixels_ + kDepth - 1) / kDepth);
    const int most = (all + p_.splits - 1) / p_.splits;
    const int first = split_ * most;
    const int steps = min(all - first, most);
    if (steps > 0) {
      for (int i = static_cast<int>(threadIdx.x); i < kPlaces; i += kThreads) {
        find(first, i);
      }
      __syncthreads();
#pragma unroll
      for (int s = 0; s < kStages - 1; ++s) {
        if (s < steps) {
          bring(s);
        }
        copy_async_commit();
      }
#pragma unroll 1
      for (int s = 0; s < steps; ++s) {
        copy_async_wait<kStages - 2>();
        __syncthreads();
        if (s + kStages - 1 < steps) {
          bring((s + kStages - 1) % kStages);
        }
        copy_async_commit();
        if (static_cast<int>(threadIdx.x) < kDepth) {
          find(first + kStages * (s / kStages + 1),
               s % kStages * kDepth + static_cast<int>(threadIdx.x));
        }
        const T* const stage = shared_ + s % kStages * kStage;
        if (rows_ > kRows - kDenseGroup) {
          multiply<true>(stage);
        } else {
          multiply<false>(stage);
        }
      }
    }
    write();
  }

 private:
  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ __forceinline__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }

  // Rows of a pixel each. Vectors change places so that those of eight pixels lie in all banks, and
  // so do single floats of four pixels.
  template <int kWidth>
  __device__ __forceinline__ static int place(int pixel, int vector) {
    const int swap = sizeof(T) == 4 ? pixel % 4 * 2 : pixel % 8;
    return pixel * kWidth + (vector ^ swap) * kVector;
  }

  // Pixel i of the four steps from `step` on.
  __device__ __forceinline__ void find(int step, int i) const {
    const auto pixel = static_cast<uint32_t>(step * kDepth + i);
    Place own = {-1, 0};
    if (pixel < pixels_) {
      const uint32_t row = pixel / width_;
      const uint32_t image = row / height_;
      const int y = y_ + static_cast<int>(row - image * height_);
      const int x = x_ + static_cast<int>(pixel - row * width_);
      own.grad = image * p_.grad_batch + y * p_.grad_row + x * p_.grad_pixel;
      own.x = image * p_.x_batch + (y + shift_y_) * p_.x_row + (x + shift_x_) * p_.x_pixel;
    }
    places_[i] = own;
  }

  // Zeros for what is not there.
  __device__ __forceinline__ void bring(int stage) const {
    T* const grad = shared_ + stage * kStage;
    constexpr int kRowVectors = kRows / kVector;
#pragma unroll
    for (int i = 0; i < kDepth * kRowVectors / kThreads; ++i) {
      const int own = static_cast<int>(threadIdx.x) + i * kThreads;
      const int pixel = own / kRowVectors;
      const int vector = own % kRowVectors;
      const int64_t at = places_[stage * kDepth + pixel].grad;
      const bool valid = at >= 0 && vector * kVector < rows_;
      copy_async_16(grad + place<kRows>(pixel, vector),
                    valid ? p_.grad + at + output_ + vector * kVector : p_.grad, valid);
    }
    T* const x = grad + kRows * kDepth;
    constexpr int kColumnVectors = kColumns / kVector;
#pragma unroll
    for (int i = 0; i < kDepth * kColumnVectors / kThreads; ++i) {
      const int own = static_cast<int>(threadIdx.x) + i * kThreads;
      const int pixel = own / kColumnVectors;
      const int channel = channel_ + own % kColumnVectors * kVector;
      const Place at = places_[stage * kDepth + pixel];
      const bool valid = at.grad >= 0 && channel < p_.channels;
      copy_async_16(x + place<kColumns>(pixel, own % kColumnVectors),
                    valid ? p_.x + at.x + channel : p_.grad, valid);
    }
  }

  template <bool kFull>
  __device__ __forceinline__ void multiply(const T* grad) {
    const T* const x = grad + kRows * kDepth;
#pragma unroll(sizeof(T) == 4 ? 1 : 2)
    for (int k = 0; k < kDepth; k += kDepth / 2) {
      uint32_t b[4][2];
      load_columns(x, k, b);
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        if (kFull || i * kDenseGroup < rows_) {
          uint32_t a[4];
          load_rows(grad, k, i, a);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            dense_product<T>(sums_[i][j], a, b[j]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ static void load_rows(const T* grad, int k, int i, uint32_t (&a)[4]) {
    if constexpr (sizeof(T) == 2) {
      load_matrix_x4_transposed(
          a, grad + place<kRows>(k + lane() / 16 * 8 + lane() % 8, 2 * i + lane() / 8 % 2));
    } else {
      const int own = opaque(lane());  // else all addresses are kept
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        a[e] = element<kRows>(grad, k + own % 4 + e / 2 * 4, i * kDenseGroup + own / 4 + e % 2 * 8);
      }
    }
  }
  __device__ __forceinline__ static void load_columns(const T* x, int k, uint32_t (&b)[4][2]) {
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        uint32_t both[4];
        load_matrix_x4_transposed(
            both, x + place<kColumns>(k + lane() / 8 % 2 * 8 + lane() % 8,
                                      warp() * (kDenseColumns / 8) + j + lane() / 16));
        b[j][0] = both[0];
        b[j][1] = both[1];
        b[j + 1][0] = both[2];
        b[j + 1][1] = both[3];
      }
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          b[j][e] = element<kColumns>(x, k + lane() % 4 + 4 * e,
                                      warp() * kDenseColumns + 8 * j + lane() / 4);
        }
      }
    }
  }
  // Of floats: transposed loads are for 16 bits.
  template <int kWidth>
  __device__ __forceinline__ static uint32_t element(const T* from, int pixel, int column) {
    const T* const at = from + place<kWidth>(pixel, column / kVector) + column % kVector;
    return round_to_tf32(__float_as_uint(*at));
  }

  __device__ __forceinline__ void write() const {
    const int32_t channel = channel_ + warp() * kDenseColumns + lane() % 4 * 2;
    float* const to = p_.parts +
                      ((int64_t{split_} * p_.taps + tap_) * p_.outputs + output_) * p_.channels +
                      channel;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = i * kDenseGroup + 8 * half + lane() / 4;
        if (row < rows_) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (channel + 8 * j < p_.channels) {
              Vector<float, 2> pair;
              pair[0] = sums_[i][j][2 * half];
              pair[1] = sums_[i][j][2 * half + 1];
              store_vector(to + int64_t{row} * p_.channels + 8 * j, pair);
            }
          }
        }
      }
    }
  }

  const DenseGradientParams<T>& p_;
  Place* places_;
  T* shared_;
  int32_t output_;
  int32_t channel_;
  int32_t split_;
  int32_t tap_;
  int rows_;
  int shift_y_;
  int shift_x_;
  int y_;  // the first pixel of the output whose tap meets the picture
  int x_;
  uint32_t height_;
  uint32_t width_;
  uint32_t pixels_;
  float sums_[kGroups][4][4] = {};
};

template <class T, int kWarps>
__global__ __launch_bounds__(kWarps * 32, 1) void dense_gradient_mma_kernel(
    const __grid_constant__ DenseGradientParams<T> p) {
  using Mma = DenseGradientMma<T, kWarps>;
  PYDENSE_DYNAMIC_SHARED(typename Mma::Place, places);
  Mma(p, places, reinterpret_cast<T*>(places + Mma::kPlaces)).run();
}

template <class T>
struct DenseGradientSumParams {
  const float* parts;  // [splits, taps, part_outputs, part_channels]
  int64_t part_outputs;
  int64_t part_channels;
  int32_t splits;
  int32_t taps;
  int32_t channels;
  uint32_t channel_tiles;
  uint32_t tap_tiles;
  T* weight;  // [outputs, channels, taps]
};

constexpr int kDenseGradientThreads = 256;
constexpr int kDenseGradientTaps = 9;

// Adds the parts, from the first to the last. A block has 256 channels of an output, up to nine
// taps.
template <class T>
__global__ __launch_bounds__(kDenseGradientThreads) void dense_gradient_sum_kernel(
    const __grid_constant__ DenseGradientSumParams<T> p) {
  // Nine taps of few channels lie in different banks.
  constexpr int kPitch = kDenseGradientThreads + (sizeof(T) == 2 ? 6 : 4);
  __shared__ T tile[kDenseGradientTaps * kPitch];
  const int thread = static_cast<int>(threadIdx.x);
  uint32_t block = blockIdx.x;
  const auto channel = static_cast<int32_t>(block % p.channel_tiles) * kDenseGradientThreads;
  block /= p.channel_tiles;
  const int tap = static_cast<int>(block % p.tap_tiles) * kDenseGradientTaps;
  const uint32_t output = block / p.tap_tiles;
  const int taps = min(p.taps - tap, kDenseGradientTaps);
  const int channels = min(p.channels - channel, kDenseGradientThreads);
  const int64_t of_tap = p.part_outputs * p.part_channels;
  if (thread < channels) {
    const float* const from = p.parts + tap * of_tap + output * p.part_channels + channel + thread;
#pragma unroll 3
    for (int t = 0; t < taps; ++t) {
      float sum = from[t * of_tap];
#pragma unroll 4
      for (int s = 1; s < p.splits; ++s) {
        sum += from[(int64_t{s} * p.taps + t) * of_tap];
      }
      tile[t * kPitch + thread] = from_accumulate<T>(sum);
    }
  }
  __syncthreads();
  T* const to = p.weight + (output * int64_t{p.channels} + channel) * p.taps + tap;
#pragma unroll 4
  for (int i = thread; i < channels * taps; i += kDenseGradientThreads) {
    const int c = i / taps;
    const int t = i - c * taps;
    to[int64_t{c} * p.taps + t] = tile[t * kPitch + c];
  }
}

}  // namespace pydense
