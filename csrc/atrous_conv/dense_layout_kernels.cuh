// SPDX-License-Identifier: Apache-2.0
// Operands of dense convolutions in the order in which tensor cores read them: channels side by
// side, as many as fill vectors of 16 bytes, the last ones 0. What lies so already is not copied.
#pragma once

#include "atrous_conv/dense_tile.cuh"

namespace pydense {

constexpr int kLayoutThreads = 256;

// 16 bytes from where 4 bytes can be loaded together.
template <class T>
__device__ __forceinline__ Vector<T, kDenseVector<T>> dense_vector_of_words(const T* from) {
  constexpr int kWord = 4 / static_cast<int>(sizeof(T));
  Vector<T, kDenseVector<T>> vector;
#pragma unroll
  for (int i = 0; i < kDenseVector<T>; i += kWord) {
    const auto word = load_vector<kWord>(from + i);
#pragma unroll
    for (int e = 0; e < kWord; ++e) {
      vector[i + e] = word[e];
    }
  }
  return vector;
}

// [images, height, width, channels] from a picture of any strides, in elements.
template <class T>
struct DensePixelsParams {
  const T* from;
  int64_t batch;
  int64_t channel;
  int64_t row;
  int64_t pixel;
  int32_t channels;
  int32_t width;
  uint32_t pixels;  // of an image
  uint32_t pixel_tiles;
  uint32_t channel_tiles;
  T* to;
  int32_t to_channels;
};

// A block moves 64 channels of 64 pixels, through rows of an odd number of words.
template <class T>
__global__ __launch_bounds__(kLayoutThreads) void dense_pixels_kernel(
    const __grid_constant__ DensePixelsParams<T> p) {
  constexpr int kTile = 64;
  constexpr int kVector = kDenseVector<T>;
  constexpr int kPitch = kTile + 4 / static_cast<int>(sizeof(T));
  __shared__ __align__(4) T tile[kTile * kPitch];
  const int thread = static_cast<int>(threadIdx.x);
  uint32_t block = blockIdx.x;
  const auto channel = static_cast<int32_t>(block % p.channel_tiles) * kTile;
  block /= p.channel_tiles;
  const uint32_t pixel = block % p.pixel_tiles * kTile;
  const uint32_t image = block / p.pixel_tiles;
  {
    const uint32_t own = pixel + static_cast<uint32_t>(thread % kTile);
    const auto width = static_cast<uint32_t>(p.width);
    const T* const from = p.from + image * p.batch + own / width * p.row + own % width * p.pixel;
#pragma unroll 4
    for (int c = thread / kTile; c < kTile; c += kLayoutThreads / kTile) {
      const bool inside = own < p.pixels && channel + c < p.channels;
      tile[thread % kTile * kPitch + c] =
          inside ? from[(channel + c) * p.channel] : from_accumulate<T>(0);
    }
  }
  __syncthreads();
  constexpr int kVectors = kTile / kVector;
#pragma unroll
  for (int i = thread; i < kTile * kVectors; i += kLayoutThreads) {
    const uint32_t own = pixel + static_cast<uint32_t>(i / kVectors);
    const int c = i % kVectors * kVector;
    if (own < p.pixels && channel + c < p.to_channels) {
      store_global_vector(p.to + (image * int64_t{p.pixels} + own) * p.to_channels + channel + c,
                          dense_vector_of_words(tile + i / kVectors * kPitch + c));
    }
  }
}

// [taps, outputs, channels] from a weight of any strides, in elements.
template <class T>
struct DenseWeightParams {
  const T* from;
  int64_t output;
  int64_t channel;
  int64_t tap;  // negative where taps go from the last to the first, which `from` is then
  int32_t outputs;
  int32_t channels;
  int32_t taps;
  uint32_t channel_tiles;
  uint32_t tap_tiles;
  T* to;
  int32_t to_channels;
  bool outputs_first;  // outputs lie closer together than channels
  bool taps_first;     // and taps closest of all
};

constexpr int kWeightTaps = 9;  // of a block

// A block moves 32 channels of 32 outputs and up to nine taps.
template <class T>
__global__ __launch_bounds__(kLayoutThreads) void dense_weight_kernel(
    const __grid_constant__ DenseWeightParams<T> p) {
  constexpr int kTile = 32;
  constexpr int kVector = kDenseVector<T>;
  constexpr int kPitch = kTile + 4 / static_cast<int>(sizeof(T));
  constexpr int kTapPitch = kTile * kPitch + 16 / static_cast<int>(sizeof(T));
  __shared__ __align__(4) T tile[kWeightTaps * kTapPitch];
  const int thread = static_cast<int>(threadIdx.x);
  uint32_t block = blockIdx.x;
  const auto channel = static_cast<int32_t>(block % p.channel_tiles) * kTile;
  block /= p.channel_tiles;
  const int tap = static_cast<int>(block % p.tap_tiles) * kWeightTaps;
  const auto output = static_cast<int32_t>(block / p.tap_tiles) * kTile;
  const int taps = min(p.taps - tap, kWeightTaps);
#pragma unroll 4
  for (int i = thread; i < kTile * kTile * taps; i += kLayoutThreads) {
    const int t = p.taps_first ? i % taps : i / kTile % taps;
    const int inner = (p.taps_first ? i / taps : i) % kTile;
    const int outer = i / (kTile * taps);
    const int o = p.outputs_first ? inner : outer;
    const int c = p.outputs_first ? outer : inner;
    const bool inside = output + o < p.outputs && channel + c < p.channels;
    tile[t * kTapPitch + o * kPitch + c] =
        inside ? p.from[(output + o) * p.output + (channel + c) * p.channel + (tap + t) * p.tap]
               : from_accumulate<T>(0);
  }
  __syncthreads();
  constexpr int kVectors = kTile / kVector;
#pragma unroll 2
  for (int i = thread; i < taps * kTile * kVectors; i += kLayoutThreads) {
    const int c = i % kVectors * kVector;
    const int o = i / kVectors % kTile;
    const int t = i / (kVectors * kTile);
    if (output + o < p.outputs && channel + c < p.to_channels) {
      store_global_vector(
          p.to + (int64_t{tap + t} * p.outputs + output + o) * p.to_channels + channel + c,
          dense_vector_of_words(tile + t * kTapPitch + o * kPitch + c));
    }
  }
}

}  // namespace pydense
