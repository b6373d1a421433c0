// SPDX-License-Identifier: Apache-2.0
// Dense convolutions on tensor cores: blocks of up to 128 pixels that all read the same taps and
// 32 outputs for every warp, which has all pixels of them. Step by step, a tap's next channels are
// on their way for three steps while those of one are multiplied. Groups of 16 pixels that a tile
// does not have are not multiplied.
#pragma once

#include "atrous_conv/dense_tile.cuh"
#include "common/mma.cuh"

namespace pydense {

// A product of 16 x 8 over two vectors of 16 bytes in depth.
template <class T>
__device__ __forceinline__ void dense_product(float (&d)[4], const uint32_t (&a)[4],
                                              const uint32_t (&b)[2]) {
  if constexpr (sizeof(T) == 4) {
    mma_m16n8k8(d, a, b);
  } else {
    mma_m16n8k16<T>(d, a, b);
  }
}
template <class T, int kCount>
__device__ __forceinline__ void round_operand(uint32_t (&a)[kCount]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      a[i] = round_to_tf32(a[i]);
    }
  }
}

template <class T, int kWarps>
class DenseMma {
  static constexpr int kVector = kDenseVector<T>;
  static constexpr int kDepth = kDenseDepth<T>;
  static constexpr int kStages = 4;
  static constexpr int kColumns = kWarps * kDenseColumns;
  static constexpr int kStage = (kDenseRows + kColumns) * kDepth;
  static constexpr int kGroups = kDenseRows / kDenseGroup;
  using Stage = DenseStage<T>;

 public:
  static constexpr int kThreads = kWarps * 32;
  // Of shared memory.
  static constexpr int kBytes =
      (kStages * kStage > kWarps * Stage::kElements ? kStages * kStage
                                                    : kWarps * Stage::kElements) *
          static_cast<int>(sizeof(T)) +
      kDenseRows * 8;

  __device__ __forceinline__ DenseMma(const DenseMmaParams<T>& p, int64_t* at, T* shared)
      : p_(p),
        at_(at),
        shared_(shared),
        own_(p.classes[dense_class_of(p, blockIdx.x,
                                      [](const DenseClass& c) { return c.first_item; })]),
        branch_(p.branches[own_.branch]) {
    uint32_t item = blockIdx.x - own_.first_item;
    output_ = static_cast<int32_t>(item % branch_.column_tiles) * kColumns;
    const uint32_t column_tile = item % branch_.column_tiles;
    item /= branch_.column_tiles;
    split_ = static_cast<int32_t>(item % own_.splits);
    const uint32_t tile = item / own_.splits;
    part_ = own_.first_part + (tile * branch_.column_tiles + column_tile) * own_.splits + split_;
    pixel_ = tile * own_.tile_pixels;
    rows_ = static_cast<int>(min(static_cast<uint32_t>(own_.tile_pixels), own_.pixels - pixel_));
  }

  __device__ __forceinline__ void run() {
    prepare();
    const int all = own_.num_rows * own_.num_columns * p_.chunks;
    const int most = (all + own_.splits - 1) / own_.splits;
    const int first = split_ * most;
    const int steps = min(all - first, most);
    if (steps > 0) {
      begin(first);
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
        const T* const stage = shared_ + s % kStages * kStage;
        if (rows_ > kDenseRows - kDenseGroup) {
          multiply<true>(stage);
        } else {
          multiply<false>(stage);
        }
      }
    }
    if (own_.splits > 1) {
      write_part();
    } else {
      write();
    }
  }

 private:
  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ __forceinline__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  // Rows of an operand that a thread brings a vector of are so far apart.
  static constexpr int kRowStep = kThreads / 4;
  static constexpr int kOwnRows = kDenseRows / kRowStep;

  // Rows of four vectors, which change places so that eight rows of a matrix lie in all banks.
  __device__ __forceinline__ static int place(int row, int vector) {
    return row * kDepth + (vector ^ (row / 2 % 4)) * kVector;
  }

  // Where the block's pixels are in x, before the tap is added.
  __device__ __forceinline__ void prepare() {
    for (int row = static_cast<int>(threadIdx.x); row < kDenseRows; row += kThreads) {
      int64_t at = 0;
      if (row < rows_) {
        const DensePixel own(own_, pixel_ + static_cast<uint32_t>(row));
        at = own.image * p_.x_batch + (own.y - branch_.top) * p_.x_row +
             (own.x - branch_.left) * p_.x_pixel;
      }
      at_[row] = at;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      row_at_[i] = at_[static_cast<int>(threadIdx.x) / 4 + i * kRowStep];
    }
  }

  __device__ __forceinline__ void begin(int step) {
    const int tap = step / p_.chunks;
    chunk_ = step % p_.chunks;
    tap_row_ = own_.first_row + tap / own_.num_columns;
    tap_column_ = own_.first_column + tap % own_.num_columns;
    find_tap();
  }
  __device__ __forceinline__ void find_tap() {
    tap_at_ = int64_t{tap_row_} * branch_.dilation_y * p_.x_row +
              int64_t{tap_column_} * branch_.dilation_x * p_.x_pixel;
    weight_at_ = (int64_t{tap_row_} * branch_.kernel_width + tap_column_) * branch_.weight_tap;
  }

  // The operands of the next step; zeros for what is not there.
  __device__ __forceinline__ void bring(int stage) {
    const int vector = static_cast<int>(threadIdx.x) % 4;
    const int first = static_cast<int>(threadIdx.x) / 4;
    const int channel = chunk_ * kDepth + vector * kVector;
    const bool deep = channel < p_.channels;
    T* const pixels = shared_ + stage * kStage;
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      const int row = first + i * kRowStep;
      const bool valid = deep && row < rows_;
      copy_async_16(pixels + place(row, vector),
                    valid ? p_.x + row_at_[i] + tap_at_ + channel : p_.x, valid);
    }
    T* const outputs = pixels + kDenseRows * kDepth;
    const T* const weight = branch_.weight + weight_at_ + channel;
#pragma unroll
    for (int i = 0; i < kColumns / kRowStep; ++i) {
      const int row = first + i * kRowStep;
      const bool valid = deep && output_ + row < branch_.outputs;
      copy_async_16(outputs + place(row, vector),
                    valid ? weight + (output_ + row) * branch_.weight_output : p_.x, valid);
    }
    if (++chunk_ == p_.chunks) {
      chunk_ = 0;
      if (++tap_column_ == own_.first_column + own_.num_columns) {
        tap_column_ = own_.first_column;
        ++tap_row_;
      }
      find_tap();
    }
  }

  template <bool kFull>
  __device__ __forceinline__ void multiply(const T* pixels) {
    const T* const outputs = pixels + kDenseRows * kDepth + warp() * kDenseColumns * kDepth;
#pragma unroll
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
        if (kFull || i * kDenseGroup < rows_) {
          uint32_t a[4];
          load_matrix_x4(a, pixels + place(i * kDenseGroup + lane() % 16, k + lane() / 16));
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
    store_part<kColumns>(
        p_.parts + int64_t{part_} * (kDenseRows * kColumns) + warp() * kDenseColumns, sums_, lane(),
        0, rows_);
  }

  // Through shared memory, so that rows leave in long pieces. What a warp writes there is its own.
  __device__ __forceinline__ void write() const {
    __syncthreads();
    for (int row = static_cast<int>(threadIdx.x); row < rows_; row += kThreads) {
      at_[row] = dense_out_at(branch_, own_, pixel_ + static_cast<uint32_t>(row));
    }
    __syncthreads();
    const int32_t output = output_ + warp() * kDenseColumns;
    if (output >= branch_.outputs) {
      return;
    }
    const Stage stage = {shared_ + warp() * Stage::kElements, branch_.out_channel == 1};
    DenseFactors factors[4][2];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        factors[j][e] = DenseFactors(branch_, output + 8 * j + lane() % 4 * 2 + e);
      }
    }
#pragma unroll
    for (int first = 0; first < kDenseRows; first += Stage::kRows) {
      if (first < rows_) {
#pragma unroll
        for (int i = 0; i < Stage::kRows / kDenseGroup; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const float* const sums = sums_[first / kDenseGroup + i][j] + 2 * half;
              const float pair[2] = {factors[j][0](sums[0], branch_.relu),
                                     factors[j][1](sums[1], branch_.relu)};
              stage.put(i * kDenseGroup + 8 * half + lane() / 4, 8 * j + lane() % 4 * 2, pair);
            }
          }
        }
        __syncwarp();
        stage.leave(branch_, output, at_ + first, min(rows_ - first, Stage::kRows), lane(), 32);
        __syncwarp();
      }
    }
  }

  const DenseMmaParams<T>& p_;
  int64_t* at_;
  T* shared_;
  const DenseClass& own_;
  const DenseBranch<T>& branch_;
  int32_t output_;
  int32_t split_;
  uint32_t part_;
  uint32_t pixel_;
  int rows_;
  int64_t row_at_[kOwnRows];
  int chunk_ = 0;  // of the step that is brought next
  int tap_row_ = 0;
  int tap_column_ = 0;
  int64_t tap_at_ = 0;
  int64_t weight_at_ = 0;
  float sums_[kGroups][4][4] = {};
};

template <class T, int kWarps>
__global__ __launch_bounds__(kWarps * 32,
                             1) void dense_mma_kernel(const __grid_constant__ DenseMmaParams<T> p) {
  PYDENSE_DYNAMIC_SHARED(int64_t, at);
  DenseMma<T, kWarps>(p, at, reinterpret_cast<T*>(at + kDenseRows)).run();
}

constexpr int kDenseSumThreads = 128;

// Adds the parts of tiles, from the first to the last. A block has all pixels of a tile and 32 of
// its outputs.
template <class T>
__global__ __launch_bounds__(kDenseSumThreads) void dense_sum_kernel(
    const __grid_constant__ DenseMmaParams<T> p) {
  using Stage = DenseStage<T>;
  __shared__ __align__(16) T data[Stage::kElements];
  __shared__ int64_t at[kDenseRows];
  const int thread = static_cast<int>(threadIdx.x);
  const auto groups = static_cast<uint32_t>(p.tile_columns / kDenseColumns);
  const uint32_t sum = blockIdx.x / groups;
  const DenseClass& own =
      p.classes[dense_class_of(p, sum, [](const DenseClass& c) { return c.first_sum; })];
  const DenseBranch<T>& branch = p.branches[own.branch];
  const uint32_t item = sum - own.first_sum;
  const auto column = static_cast<int32_t>(blockIdx.x % groups) * kDenseColumns;
  const int32_t output = static_cast<int32_t>(item % branch.column_tiles) * p.tile_columns + column;
  const uint32_t pixel = item / branch.column_tiles * own.tile_pixels;
  const int rows =
      static_cast<int>(min(static_cast<uint32_t>(own.tile_pixels), own.pixels - pixel));
  if (output >= branch.outputs) {
    return;
  }
  if (thread < rows) {
    at[thread] = dense_out_at(branch, own, pixel + static_cast<uint32_t>(thread));
  }
  const Stage stage = {data, branch.out_channel == 1};
  const int own_column = thread % 8 * 4;
  DenseFactors factors[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    factors[e] = DenseFactors(branch, output + own_column + e);
  }
  const int64_t part = int64_t{kDenseRows} * p.tile_columns;
  const float* const from =
      p.parts + (own.first_part + item * own.splits) * part + column + own_column;
#pragma unroll 1
  for (int first = 0; first < rows; first += Stage::kRows) {
    __syncthreads();
#pragma unroll 1
    for (int row = thread / 8; row < min(rows - first, Stage::kRows); row += kDenseSumThreads / 8) {
      const float* const place = from + int64_t{first + row} * p.tile_columns;
      auto total = load_vector<4>(place);
#pragma unroll 4
      for (int s = 1; s < own.splits; ++s) {
        const auto next = load_vector<4>(place + s * part);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          total[e] += next[e];
        }
      }
      float results[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        results[e] = factors[e](total[e], branch.relu);
      }
      stage.put(row, own_column, results);
    }
    __syncthreads();
    stage.leave(branch, output, at + first, min(rows - first, Stage::kRows), thread,
                kDenseSumThreads);
  }
}

}  // namespace pydense
