// SPDX-License-Identifier: Apache-2.0
// Depthwise-separable convolutions on tensor cores: blocks of up to 128 pixels and 256 outputs, a
// warp 64 x 32 of them. Step by step, half of the warps make the map between the two convolutions
// for the next channels, from the taps straight into the operand in shared memory, while the others
// multiply; then they change places. Pixels are rows that lie a rate apart, one after the other:
// what taps of neighbouring rows read is in the first-level cache.
#pragma once

#include "atrous_conv/dense_mma_kernels.cuh"

namespace pydense {

constexpr int kSeparableThreads = 512;
constexpr int kSeparableColumns = 256;  // outputs of a block
constexpr int kSeparableKernel = 3;     // rows and columns of the depthwise kernel
constexpr int kSeparableTaps = kSeparableKernel * kSeparableKernel;

template <class T>
struct SeparableMmaParams {
  DenseMmaParams<T> dense;  // x, and in class and branch 0 the 1x1 convolution
  int64_t x_channel;
  const T* weight;  // [channels, 3, 3]
  const T* bias;    // [channels], or null
  int32_t channels;
  bool inner_relu;
  int64_t height;  // of x
  int64_t width;
  int64_t dilation_y;
  int64_t dilation_x;
  int64_t top;
  int64_t left;
  int64_t row_step;  // from tap to tap, in elements of x
  int64_t column_step;
};

// kVectors: 16 bytes of channels are loaded together, and lanes lie along channels; else one by
// one, with lanes along pixels.
template <class T, bool kVectors>
class SeparableMma {
  static constexpr int kVector = kDenseVector<T>;
  static constexpr int kDepth = kDenseDepth<T>;
  static constexpr int kOperand = kDenseRows * kDepth;
  static constexpr int kMatrix = kSeparableColumns * kDepth;
  static constexpr int kMatrices = 3;
  static constexpr int kWarps = kSeparableThreads / 32;
  static constexpr int kWarpRows = 64;
  static constexpr int kGroups = kWarpRows / kDenseGroup;
  static constexpr int kNumbers = (kSeparableTaps + 1) * kDepth;  // with the bias
  static constexpr int kPitch = kDepth + 4;  // writers of neighbouring taps do not meet
  static constexpr int kTogether = kVectors ? kSeparableKernel : 1;  // taps that are on their way
  using Stage = DenseStage<T>;
  static_assert(kNumbers <= kSeparableThreads && Stage::kRows == kWarpRows);

 public:
  // Of shared memory: places of results, numbers of taps, operands.
  static constexpr int kNumberBytes = 2 * (kSeparableTaps + 1) * kPitch * 4;
  static constexpr int kBytes = kDenseRows * 8 + kNumberBytes +
                                (2 * kOperand + kMatrices * kMatrix > kWarps * Stage::kElements
                                     ? 2 * kOperand + kMatrices * kMatrix
                                     : kWarps * Stage::kElements) *
                                    static_cast<int>(sizeof(T));

  __device__ __forceinline__ SeparableMma(const SeparableMmaParams<T>& p, int64_t* at)
      : p_(p),
        at_(at),
        numbers_(reinterpret_cast<float*>(at + kDenseRows)),
        shared_(reinterpret_cast<T*>(reinterpret_cast<char*>(at + kDenseRows) + kNumberBytes)),
        own_(p.dense.classes[0]),
        branch_(p.dense.branches[0]) {
    uint32_t item = blockIdx.x;
    const uint32_t column_tile = item % branch_.column_tiles;
    output_ = static_cast<int32_t>(column_tile) * kSeparableColumns;
    item /= branch_.column_tiles;
    split_ = static_cast<int32_t>(item % own_.splits);
    const uint32_t tile = item / own_.splits;
    part_ = (tile * branch_.column_tiles + column_tile) * own_.splits + split_;
    pixel_ = tile * own_.tile_pixels;
    rows_ = static_cast<int>(min(static_cast<uint32_t>(own_.tile_pixels), own_.pixels - pixel_));
  }

  __device__ __forceinline__ void run() {
    const int all = p_.dense.chunks;
    const int most = (all + own_.splits - 1) / own_.splits;
    const int first = split_ * most;
    const int steps = min(all - first, most);
    if (steps > 0) {
      find_taps();
      put_number(0, number(first));
      bring_matrix(first, 0);
      copy_async_commit();
      if (steps > 1) {
        bring_matrix(first + 1, 1);
      }
      copy_async_commit();
      __syncthreads();
      make(first, 0);
      put_number(1, number(first + 1));
#pragma unroll 1
      for (int s = 0; s < steps; ++s) {
        copy_async_wait<1>();
        __syncthreads();
        if (s + 2 < steps) {
          bring_matrix(first + s + 2, (s + 2) % kMatrices);
        }
        copy_async_commit();
        const float next = number(first + s + 2);
        // Half of the warps make what the others keep the tensor cores busy with.
#pragma unroll 1
        for (int turn = 0; turn < 2; ++turn) {
          if ((turn + warp() / 4) % 2 == 0) {
            multiply(s);
          } else if (s + 1 < steps) {
            make(first + s + 1, (s + 1) % 2);
          }
        }
        put_number(s % 2, next);
      }
    }
    if (own_.splits > 1) {
      write_part();
    } else {
      write();
    }
  }

 private:
  __device__ __forceinline__ static int thread() { return opaque(static_cast<int>(threadIdx.x)); }
  __device__ __forceinline__ static int lane() { return thread() % 32; }
  __device__ __forceinline__ static int warp() { return thread() / 32; }
  // The warp's, of the block.
  __device__ __forceinline__ static int first_row() { return warp() / 8 * kWarpRows; }
  __device__ __forceinline__ static int first_column() { return warp() % 8 * kDenseColumns; }
  // Of the map between, each thread makes one vector of a pixel.
  __device__ __forceinline__ static int own_row() {
    return kVectors ? thread() / 4 : thread() % kDenseRows;
  }
  __device__ __forceinline__ static int own_vector() {
    return kVectors ? thread() % 4 : thread() / kDenseRows;
  }
  __device__ __forceinline__ static int place(int row, int vector) {
    return row * kDepth + (vector ^ (row / 2 % 4)) * kVector;
  }
  __device__ __forceinline__ T* operand(int s) const { return shared_ + s % 2 * kOperand; }
  __device__ __forceinline__ T* matrix(int s) const {
    return shared_ + 2 * kOperand + s % kMatrices * kMatrix;
  }

  // Where the own pixel's first tap is, and which of its taps meet the picture.
  __device__ __forceinline__ void find_taps() {
    if (own_row() >= rows_) {
      return;
    }
    const DensePixel own(own_, pixel_ + static_cast<uint32_t>(own_row()));
    const int64_t y = own.y - p_.top;
    const int64_t x = own.x - p_.left;
    x_at_ = own.image * p_.dense.x_batch + y * p_.dense.x_row + x * p_.dense.x_pixel;
#pragma unroll
    for (int t = 0; t < kSeparableTaps; ++t) {
      const int64_t row = y + t / kSeparableKernel * p_.dilation_y;
      const int64_t column = x + t % kSeparableKernel * p_.dilation_x;
      const bool meets = row >= 0 && row < p_.height && column >= 0 && column < p_.width;
      taps_ |= static_cast<int>(meets) << t;
    }
  }

  // The thread's number of a step: weights of channels one after the other, then biases.
  __device__ __forceinline__ float number(int chunk) const {
    const bool weighs = thread() < kDepth * kSeparableTaps;
    const int own = thread() - (weighs ? 0 : kDepth * kSeparableTaps);
    const int32_t channel = chunk * kDepth + (weighs ? own / kSeparableTaps : own);
    if (thread() >= kNumbers || channel >= p_.channels || (!weighs && p_.bias == nullptr)) {
      return 0;
    }
    return to_float(weighs ? p_.weight[int64_t{chunk} * kDepth * kSeparableTaps + own]
                           : p_.bias[channel]);
  }
  __device__ __forceinline__ void put_number(int buffer, float value) const {
    if (thread() < kNumbers) {
      const bool weighs = thread() < kDepth * kSeparableTaps;
      const int own = thread() - (weighs ? 0 : kDepth * kSeparableTaps);
      const int tap = weighs ? own % kSeparableTaps : kSeparableTaps;
      const int channel = weighs ? own / kSeparableTaps : own;
      numbers_[(buffer * (kSeparableTaps + 1) + tap) * kPitch + channel] = value;
    }
  }

  __device__ __forceinline__ void bring_matrix(int chunk, int stage) const {
    const int vector = thread() % 4;
    const int32_t channel = chunk * kDepth + vector * kVector;
    const bool deep = channel < p_.dense.channels;
#pragma unroll
    for (int i = 0; i < kSeparableColumns * 4 / kSeparableThreads; ++i) {
      const int row = thread() / 4 + i * (kSeparableThreads / 4);
      const bool valid = deep && output_ + row < branch_.outputs;
      copy_async_16(matrix(stage) + place(row, vector),
                    valid ? branch_.weight + (output_ + row) * branch_.weight_output + channel
                          : branch_.weight,
                    valid);
    }
  }

  __device__ __forceinline__ Vector<T, kVector> load(const T* from, int32_t channel) const {
    if constexpr (kVectors) {
      return load_vector<kVector>(from);
    } else {
      Vector<T, kVector> values;
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        values[e] = channel + e < p_.channels ? from[e * p_.x_channel] : from_accumulate<T>(0);
      }
      return values;
    }
  }

  // The own vector of the map between: from the bias and the first tap to the last.
  __device__ __forceinline__ void make(int chunk, int buffer) const {
    const int32_t channel = chunk * kDepth + own_vector() * kVector;
    const float* const numbers =
        numbers_ + buffer * (kSeparableTaps + 1) * kPitch + own_vector() * kVector;
    float sum[kVector];
    take_numbers(numbers + kSeparableTaps * kPitch, sum);
    const int taps = channel < p_.channels ? taps_ : 0;
    const T* const x = p_.dense.x;
    int64_t at = x_at_ + (kVectors ? channel : channel * p_.x_channel);
#pragma unroll 1
    for (int i = 0; i < kSeparableKernel; ++i, at += p_.row_step) {
#pragma unroll 1
      for (int first = 0; first < kSeparableKernel; first += kTogether) {
        Vector<T, kVector> values[kTogether];
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          if (taps >> (i * kSeparableKernel + first + j) & 1) {
            values[j] = load(x + (at + (first + j) * p_.column_step), channel);
          }
        }
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          const int tap = i * kSeparableKernel + first + j;
          if (taps >> tap & 1) {
            float weights[kVector];
            take_numbers(numbers + tap * kPitch, weights);
#pragma unroll
            for (int e = 0; e < kVector; ++e) {
              sum[e] = fmaf(weights[e], to_float(values[j][e]), sum[e]);
            }
          }
        }
      }
    }
    Vector<T, kVector> result;
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      result[e] = from_accumulate<T>(p_.inner_relu && sum[e] < 0 ? 0 : sum[e]);  // NaN stays
    }
    store_vector(operand(buffer) + place(own_row(), own_vector()), result);
  }
  __device__ __forceinline__ static void take_numbers(const float* from, float (&to)[kVector]) {
#pragma unroll
    for (int e = 0; e < kVector; e += 4) {
      const auto four = load_vector<4>(from + e);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        to[e + k] = four[k];
      }
    }
  }

  __device__ __forceinline__ void multiply(int s) {
    const T* const pixels = operand(s);
    const T* const outputs = matrix(s) + first_column() * kDepth;
    if (output_ + first_column() >= branch_.outputs) {
      return;
    }
#pragma unroll 1
    for (int k = 0; k < 4; k += 2) {  // vectors
      uint32_t b[4][2];
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        uint32_t both[4];
        load_matrix_x4(both,
                       outputs + place(8 * j + lane() / 16 * 8 + lane() % 8, k + lane() / 8 % 2));
        round_operand<T>(both);
        b[j][0] = both[0];
        b[j][1] = both[1];
        b[j + 1][0] = both[2];
        b[j + 1][1] = both[3];
      }
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        const int row = first_row() + i * kDenseGroup;
        if (row < rows_) {
          uint32_t a[4];
          load_matrix_x4(a, pixels + place(row + lane() % 16, k + lane() / 16));
          round_operand<T>(a);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            dense_product<T>(sums_[i][j], a, b[j]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void write_part() const {
    store_part<kSeparableColumns>(
        p_.dense.parts + int64_t{part_} * (kDenseRows * kSeparableColumns) + first_column(), sums_,
        lane(), first_row(), rows_);
  }

  // As of dense convolutions: through shared memory, where a warp's part is its own.
  __device__ __forceinline__ void write() const {
    __syncthreads();
    for (int row = thread(); row < rows_; row += kSeparableThreads) {
      at_[row] = dense_out_at(branch_, own_, pixel_ + static_cast<uint32_t>(row));
    }
    __syncthreads();
    const int32_t output = output_ + first_column();
    if (output >= branch_.outputs || first_row() >= rows_) {
      return;
    }
    const Stage stage = {shared_ + warp() * Stage::kElements, branch_.out_channel == 1};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      DenseFactors factors[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        factors[e] = DenseFactors(branch_, output + 8 * j + lane() % 4 * 2 + e);
      }
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* const sums = sums_[i][j] + 2 * half;
          const float pair[2] = {factors[0](sums[0], branch_.relu),
                                 factors[1](sums[1], branch_.relu)};
          stage.put(i * kDenseGroup + 8 * half + lane() / 4, 8 * j + lane() % 4 * 2, pair);
        }
      }
    }
    __syncwarp();
    stage.leave(branch_, output, at_ + first_row(), min(rows_ - first_row(), Stage::kRows), lane(),
                32);
  }

  const SeparableMmaParams<T>& p_;
  int64_t* at_;
  float* numbers_;
  T* shared_;
  const DenseClass& own_;
  const DenseBranch<T>& branch_;
  int32_t output_;
  int32_t split_;
  uint32_t part_;
  uint32_t pixel_;
  int rows_;
  int taps_ = 0;  // a bit for each
  int64_t x_at_ = 0;
  float sums_[kGroups][4][4] = {};
};

template <class T, bool kVectors>
__global__ __launch_bounds__(kSeparableThreads, 1) void separable_mma_kernel(
    const __grid_constant__ SeparableMmaParams<T> p) {
  PYDENSE_DYNAMIC_SHARED(int64_t, at);
  SeparableMma<T, kVectors>(p, at).run();
}

}  // namespace pydense
