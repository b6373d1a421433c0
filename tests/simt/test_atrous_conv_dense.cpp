// SPDX-License-Identifier: Apache-2.0
#include "dense_checks.h"

namespace {

using namespace dense_checks;  // NOLINT(google-build-using-namespace)

template <class T>
void formats() {
  const bool last = simt::config().seed % 2 == 0;  // a schedule each
  for (const bool weight_last : {false, true}) {
    convolve<T>(1, 16, 5, 6, {Branch::same(24, 2)}, {.last = last, .weight_last = weight_last});
    convolve<T>(1, 8, 4, 3, {Branch::same(16, 1)},
                {.last = !last, .weight_last = weight_last, .transposed = true});
  }
}
void dtypes() {
  formats<__nv_bfloat16>();
  formats<__half>();
  formats<float>();
}

// No vector fits: odd numbers of channels and outputs, gaps, an odd beginning.
void odd_numbers() {
  for (const bool last : {false, true}) {
    convolve<__nv_bfloat16>(2, 13, 4, 5, {Branch::same(7, 2)}, {.last = last, .factors = false});
    convolve<__half>(1, 8, 3, 7, {Branch::same(8, 1)},
                     {.last = last, .weight_last = true, .gap = 3, .skip = 1});
    convolve<__half>(1, 8, 3, 7, {Branch::same(8, 1)},
                     {.last = last, .weight_last = true, .gap = 8, .skip = 8});
    convolve<float>(1, 3, 2, 3, {Branch::same(1, 1)}, {.last = last});
  }
}

// Kernels of all kinds, uneven padding, outputs without any tap.
void kernels() {
  const bool last = simt::config().seed % 2 == 0;  // a schedule each
  convolve<__half>(1, 8, 9, 7, {{5, 2, 3, 3, 2, 4, 0, 1, 6}}, {.last = last});
  convolve<__half>(1, 8, 2, 2, {{4, 2, 2, 1, 1, 5, 4, 5, 4}}, {.last = last});
  convolve<__nv_bfloat16>(1, 8, 6, 5, {Branch::same(3, 1, 5)}, {.last = !last});
  convolve<__nv_bfloat16>(2, 8, 7, 5, {Branch::same(9, 40)}, {.last = last});
  convolve<__nv_bfloat16>(3, 8, 1, 1, {Branch::same(9, 1, 1)}, {.last = !last});
}

// Several tiles of pixels and of outputs, full ones among them; long sums, in parts.
void several_tiles() {
  const bool last = simt::config().seed % 2 == 0;
  convolve<__nv_bfloat16>(2, 40, 9, 17, {Branch::same(140, 3)}, {.last = last});
  convolve<__half>(1, 200, 12, 13, {Branch::same(40, 4)}, {.last = !last});
  convolve<float>(1, 72, 12, 12, {Branch::same(33, 12, 1)}, {.last = last});
}

void several_branches() {
  const bool last = simt::config().seed % 2 == 0;
  convolve<__nv_bfloat16>(1, 24, 9, 8,
                          {Branch::same(16, 1, 1), Branch::same(24, 2), Branch::same(8, 5)},
                          {.last = last, .weight_last = !last});
  convolve<__half>(1, 136, 7, 7, {Branch::same(5, 3), Branch::same(36, 9), Branch::same(3, 1, 1)},
                   {.last = !last});
  // More classes than a launch has.
  convolve<__half>(1, 8, 7, 6, {Branch::same(3, 1, 5), Branch::same(8, 2, 5)}, {.last = last});
}

template <class T>
void gradient_formats() {
  const bool last = simt::config().seed % 2 == 0;
  for (const bool weight_last : {false, true}) {
    weight_gradient<T>(2, 16, 5, 6, Branch::same(24, 2),
                       {.last = last, .weight_last = weight_last});
  }
}
void gradients() {
  const bool last = simt::config().seed % 2 == 0;
  gradient_formats<__nv_bfloat16>();
  gradient_formats<__half>();
  gradient_formats<float>();
  weight_gradient<__half>(1, 13, 4, 5, Branch::same(7, 2), {.last = last, .skip = 1});
  weight_gradient<__half>(2, 8, 9, 7, {5, 2, 3, 3, 2, 4, 0, 1, 6}, {.last = !last, .gap = 8});
  weight_gradient<__nv_bfloat16>(1, 8, 6, 5, Branch::same(8, 1, 5), {.last = last});
  weight_gradient<__nv_bfloat16>(2, 8, 3, 4, Branch::same(8, 40), {.last = last});
}
// Several tiles of outputs and of channels, and long sums in parts.
void gradient_tiles() {
  const bool last = simt::config().seed % 2 == 0;
  switch (simt::config().seed % 3) {
    case 0:
      return weight_gradient<__nv_bfloat16>(1, 264, 13, 14, Branch::same(130, 1, 1),
                                            {.last = last, .weight_last = last});
    case 1:
      return weight_gradient<__half>(2, 136, 11, 9, Branch::same(40, 4), {.last = !last});
    default:
      return weight_gradient<float>(1, 20, 17, 16, Branch::same(132, 9), {.last = last});
  }
}

void nothing() {
  weight_gradient<__half>(0, 8, 4, 4, Branch::same(8, 2), {});
  convolve<__half>(0, 8, 4, 4, {Branch::same(8, 2)}, {});
}

}  // namespace

int main(int argc, char** argv) {
  return simt::run_cases(argc, argv,
                         {
                             {"every dtype", dtypes},
                             {"odd numbers", odd_numbers},
                             {"kernels", kernels},
                             {"several tiles", several_tiles},
                             {"several branches", several_branches},
                             {"gradients of weights", gradients},
                             {"gradients of weights, several tiles", gradient_tiles},
                             {"nothing", nothing},
                         });
}
