// SPDX-License-Identifier: Apache-2.0
// Dense convolutions on the tensor cores of sm_90a: the twin of dense_mma_kernels.cuh with boxes
// that the copy engine brings (dense_boxes.h). One warp of a block keeps bringing operands, of tile
// after tile; eight multiply, four of them 64 pixels x 128 outputs. Blocks stay: block b has tiles
// b, b + blocks, ... of the launch's list, whose longest come first.
//
// EXPERIMENTAL: compiled, but never run; the shim has no such instructions. Its tiles and steps are
// proven on the CPU (tests/cpp/test_dense_boxes.cpp).
#pragma once

#include "atrous_conv/dense_boxes.h"
#include "atrous_conv/dense_tile.cuh"
#include "common/tensor_copy.cuh"

namespace pydense {

constexpr int kWgmmaColumns = 128;  // outputs of a tile
constexpr int kWgmmaDepth = 64;     // channels of a step, 128 bytes
constexpr int kWgmmaStages = 4;
constexpr int kWgmmaThreads = 3 * 128;  // four warps of which one copies, and eight that multiply
constexpr int kWgmmaWarps = 8;          // that multiply
constexpr int kWgmmaStagePitch = kWgmmaColumns + 8;  // results on their way out

template <class T>
struct DenseWgmmaParams {
  CUtensorMap x[kDenseBoxShapes];
  CUtensorMap weights[kMaxDenseBranches];
  DenseBoxSteps steps[kMaxDenseBranches];
  DenseBranch<T> branches[kMaxDenseBranches];
  DenseBoxClass classes[kMaxDenseBoxClasses];
  int32_t num_classes;
  uint32_t items;
};

template <class T>
struct DenseWgmmaStage {
  T pixels[kDenseBoxPixels * kWgmmaDepth];
  T outputs[kWgmmaColumns * kWgmmaDepth];
};
template <class T>
struct DenseWgmmaShared {
  DenseWgmmaStage<T> stages[kWgmmaStages];  // at a multiple of 1024 bytes
  T results[kWgmmaWarps][16 * kWgmmaStagePitch];
  uint64_t full[kWgmmaStages];
  uint64_t empty[kWgmmaStages];
};
// No counted launch holds it to its size, for the shim cannot run it.
static_assert(sizeof(DenseWgmmaShared<__half>) + 1024 <= 227 * 1024, "more than a block may have");

template <class T>
class DenseWgmma {
  using Shared = DenseWgmmaShared<T>;
  static_assert(sizeof(T) == 2 && sizeof(DenseWgmmaStage<T>) % 1024 == 0);

 public:
  __device__ __forceinline__ DenseWgmma(const DenseWgmmaParams<T>& p, Shared& shared)
      : p_(p), shared_(shared) {}

  __device__ __forceinline__ void run() {
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < kWgmmaStages; ++i) {
        barrier_init(&shared_.full[i], 1);
        barrier_init(&shared_.empty[i], kWgmmaWarps);
      }
      barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
      give_registers<40>();
      if (threadIdx.x == 0) {
        bring();
      }
    } else {
      take_registers<232>();
      multiply();
    }
  }

 private:
  // Where a step's operands are, of all steps of a block's tiles.
  struct Place {
    int stage = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void next() {
      if (++stage == kWgmmaStages) {
        stage = 0;
        parity ^= 1;
      }
    }
  };

  __device__ __forceinline__ const DenseBoxClass& class_of(uint32_t item) const {
    int low = 0;
    int high = p_.num_classes - 1;
#pragma unroll 1
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (p_.classes[middle].first_item <= item) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return p_.classes[low];
  }

  __device__ __forceinline__ void bring() {
    Place place;
#pragma unroll 1
    for (uint32_t item = blockIdx.x; item < p_.items; item += gridDim.x) {
      const DenseBoxClass& own = class_of(item);
      const DenseBoxSteps& steps = p_.steps[own.branch];
      const DenseBoxTile tile(own, item - own.first_item, p_.branches[own.branch].column_tiles,
                              kWgmmaColumns);
      const int count = steps.count(own);
#pragma unroll 1
      for (int s = 0; s < count; ++s) {
        const DenseBoxStep at(steps, own, tile, s);
        uint64_t* const full = &shared_.full[place.stage];
        barrier_wait(&shared_.empty[place.stage], place.parity ^ 1);
        barrier_expect(full, static_cast<int>(sizeof(DenseWgmmaStage<T>)));
        DenseWgmmaStage<T>& to = shared_.stages[place.stage];
        const int32_t channel = at.chunk * kWgmmaDepth;
        copy_box_4d(to.pixels, p_.x[own.shape], full, channel, at.x, at.y, tile.image);
        copy_box_3d(to.outputs, p_.weights[own.branch], full, channel, tile.output, at.tap);
        place.next();
      }
    }
  }

  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  // Among those that multiply.
  __device__ __forceinline__ static int warp() { return static_cast<int>(threadIdx.x) / 32 - 4; }

  __device__ __forceinline__ void multiply() {
    Place place;
#pragma unroll 1
    for (uint32_t item = blockIdx.x; item < p_.items; item += gridDim.x) {
      const DenseBoxClass& own = class_of(item);
      const DenseBranch<T>& branch = p_.branches[own.branch];
      const DenseBoxTile tile(own, item - own.first_item, branch.column_tiles, kWgmmaColumns);
      const int count = p_.steps[own.branch].count(own);
      float sums[64];
#pragma unroll
      for (float& sum : sums) {
        sum = 0;
      }
      int before = 0;  // the stage of the step before
#pragma unroll 1
      for (int s = 0; s < count; ++s) {
        barrier_wait(&shared_.full[place.stage], place.parity);
        const DenseWgmmaStage<T>& from = shared_.stages[place.stage];
        const uint64_t a = matrix_descriptor(from.pixels + warp() / 4 * 64 * kWgmmaDepth);
        const uint64_t b = matrix_descriptor(from.outputs);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kWgmmaDepth; k += 16) {
          const uint64_t step = matrix_descriptor_step(k * static_cast<int>(sizeof(T)));
          wgmma_m64n128k16<T>(sums, a + step, b + step);
        }
        wgmma_commit();
        wgmma_wait<1>();  // the products of the step before are done
        if (s > 0 && lane() == 0) {
          barrier_arrive(&shared_.empty[before]);
        }
        before = place.stage;
        place.next();
      }
      wgmma_wait<0>();
      wgmma_settle(sums);
      if (count > 0 && lane() == 0) {
        barrier_arrive(&shared_.empty[before]);
      }
      write(own, branch, tile, sums);
    }
  }

  // Through shared memory, where a warp's part is its own.
  __device__ __forceinline__ void write(const DenseBoxClass& own, const DenseBranch<T>& branch,
                                        const DenseBoxTile& tile, const float (&sums)[64]) const {
    constexpr int kVector = kDenseVector<T>;
    T* const results = shared_.results[warp()];
#pragma unroll
    for (int j = 0; j < kWgmmaColumns / 8; ++j) {
      const int column = 8 * j + lane() % 4 * 2;
      const DenseFactors one(branch, tile.output + column);
      const DenseFactors other(branch, tile.output + column + 1);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Vector<T, 2> pair;
        pair[0] = from_accumulate<T>(one(sums[4 * j + 2 * half], branch.relu));
        pair[1] = from_accumulate<T>(other(sums[4 * j + 2 * half + 1], branch.relu));
        store_vector(results + (lane() / 4 + 8 * half) * kWgmmaStagePitch + column, pair);
      }
    }
    __syncwarp();
    const int inside = min(branch.outputs - tile.output, kWgmmaColumns);
    T* const out = branch.out + tile.image * branch.out_batch + tile.output * branch.out_channel;
    if (branch.out_channel == 1 && branch.out_vectors) {
      constexpr int kVectors = kWgmmaColumns / kVector;
#pragma unroll 1
      for (int i = lane(); i < 16 * kVectors; i += 32) {
        const int column = i % kVectors * kVector;
        const DenseBoxPixel pixel(own, tile, warp() * 16 + i / kVectors);
        if (pixel.inside && column < inside) {
          store_vector(out + pixel.y * branch.out_row + pixel.x * branch.out_pixel + column,
                       load_vector<kVector>(results + i / kVectors * kWgmmaStagePitch + column));
        }
      }
    } else {
#pragma unroll 1
      for (int i = lane(); i < 16 * inside; i += 32) {
        const DenseBoxPixel pixel(own, tile, warp() * 16 + i % 16);
        if (pixel.inside) {
          out[i / 16 * branch.out_channel + pixel.y * branch.out_row + pixel.x * branch.out_pixel] =
              results[i % 16 * kWgmmaStagePitch + i / 16];
        }
      }
    }
    __syncwarp();
  }

  const DenseWgmmaParams<T>& p_;
  Shared& shared_;
};

template <class T>
__global__ __launch_bounds__(kWgmmaThreads, 1) void dense_wgmma_kernel(
    const __grid_constant__ DenseWgmmaParams<T> p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  PYDENSE_DYNAMIC_SHARED(unsigned char, bytes);
  const uint32_t over = shared_address(bytes) % 1024;
  DenseWgmma<T>(p, *reinterpret_cast<DenseWgmmaShared<T>*>(bytes + (1024 - over) % 1024)).run();
#else
  __trap();  // code for another card, which never has it
#endif
}

}  // namespace pydense
