// SPDX-License-Identifier: Apache-2.0
// The matrix products of summed atrous convolutions (tap_maps.h), by blocks of pixels: what every
// tap makes of every pixel, and the gradients of both, whose maps are made in parts that stay in
// the cache.
//
//   maps[t][o](p) = sum over c of stack[t][o][c] x[c](p), for the rows that the tap reads
//   grad_x[c](p) = sum over t, o of stack[t][o][c] grad[o](p - tap t)
//   grad_stack[t][o][c] = sum over images and p of grad[o](p - tap t) x[c](p)
//
// A block multiplies the taps from the first to the last one that reads its rows: they are few
// where taps are in order of their rows. Sums are those of gemm_panels.h, in
// the order of c, of taps and outputs, and of pixels: the same bits for any number of threads.
#pragma once

#include "atrous_conv/tap_maps.h"

namespace pydense {

// Pictures are dense: [images, channels, height, width], or channels_last.
struct TapProductShape {
  TapMaps taps;  // `wide` is not read
  int64_t images;
  int64_t channels;
  bool channels_last;  // x and its gradient
};

// S is the type of pictures, T that of sums (float, or double for double), P that of the stack: S
// for bfloat16 where pairs are multiplied (multiplies_bf16_pairs), else T.
struct TapProductArgs {
  TapProductShape shape;
  const void* x;      // S
  const void* stack;  // P [taps, outputs, channels]
  const void* bias;   // T [outputs] or null
  TapPicture out;     // S; images are out_image apart
  int64_t out_image;
  int64_t workspace;  // bytes of maps that are made at a time; those of a picture at least
};

struct TapPictureGradientArgs {
  TapProductShape shape;
  const void* grad;   // S [images, outputs, height, width]
  const void* stack;  // P [taps, outputs, channels]
  void* grad_x;       // S
};

struct TapStackGradientArgs {
  TapProductShape shape;
  const void* grad;  // S [images, outputs, height, width]
  const void* x;     // S
  void* grad_stack;  // T [taps, outputs, channels]
};

void tap_products(const char* op, FloatType dtype, const TapProductArgs& args,
                  ParallelFor parallel_for);
void tap_picture_gradient(const char* op, FloatType dtype, const TapPictureGradientArgs& args,
                          ParallelFor parallel_for);
void tap_stack_gradient(const char* op, FloatType dtype, const TapStackGradientArgs& args,
                        ParallelFor parallel_for);

// The maps of images, T [count, taps, outputs, height, width].
struct TapMapsArgs {
  TapProductShape shape;  // with the images that are multiplied
  const void* x;
  const void* stack;
  void* maps;
};

struct TapProductFunctions {
  void (*maps)(const TapMapsArgs&, ParallelFor);
  void (*picture)(const TapPictureGradientArgs&, ParallelFor);
  void (*stack)(const TapStackGradientArgs&, ParallelFor);
};
// By FloatType.
struct TapProductsTable {
  TapProductFunctions of[4];
};
PYDENSE_DECLARE_CPU_TABLES(TapProductsTable, kTapProductsTable)
#if defined(PYDENSE_X86_KERNELS)
namespace avx512_bf16 {
extern const TapProductFunctions kTapProductsBf16;
}
#endif

}  // namespace pydense
