// SPDX-License-Identifier: Apache-2.0
// Labels, softmax and sums of windows against plain loops in double.
#include "head_argmax.h"
#include "head_logits.h"
#include "head_softmax.h"
#include "segmentation_head/segmentation_head_cuda.h"

namespace {

template <class S>
void accumulate_into(const HeadCase& c, Layout layout) {
  using T = Accumulate<S>;
  constexpr int64_t kTop = 3;
  constexpr int64_t kLeft = 2;
  simt::Logits<S> logits(c);
  simt::Array<T> sum(c.images, c.classes, c.out_height + 5, c.out_width + 4, layout, "sum");
  simt::Array<T> before(c.images, c.classes, c.out_height + 5, c.out_width + 4, layout, "before");
  sum.fill(9, 2);
  before.fill(9, 2);
  simt::Array<T> weight(1, 1, c.out_height, c.out_width, Layout::kGaps, "weight");
  weight.fill(10, 1);
  pydense::UpsampleAccumulateCudaArgs<T> args = {logits.view(),
                                                 simt::axes_of<T>(c),
                                                 &sum.at(0, 0, kTop, kLeft),
                                                 {},
                                                 weight.data(),
                                                 {weight.strides()[2], weight.strides()[3]}};
  std::copy_n(sum.strides().begin(), 4, args.strides);
  upsample_accumulate_cuda(args, 0, nullptr);
  const double tolerance = sizeof(T) == 8 ? 1e-12 : 1e-5;
  HeadCase whole = c;
  whole.out_height += 5;
  whole.out_width += 4;
  size_t i = 0;
  simt::for_each_output(whole, [&](int64_t n, int64_t row, int64_t column) {
    const int64_t y = row - kTop;
    const int64_t x = column - kLeft;
    const bool inside = y >= 0 && y < c.out_height && x >= 0 && x < c.out_width;
    const std::vector<double> values =
        inside ? logits.upsampled(n, y, x)
               : std::vector<double>(static_cast<size_t>(c.classes), 0.0);
    for (int64_t k = 0; k < c.classes; ++k) {
      const double factor = inside ? weight.value(0, 0, y, x) : 0.0;
      simt::expect_close_at(
          __FILE__, __LINE__, sum.value(n, k, row, column),
          before.value(n, k, row, column) + factor * values[static_cast<size_t>(k)], tolerance,
          inside ? tolerance : 0, i++);
    }
  });
}

template <class S>
void accumulate() {
  for (const HeadCase& c : {HeadCase{2, 3, 4, 5, 17, 23, false, Layout::kChannelsLast},
                            HeadCase{1, 70, 3, 11, 9, 137, true, Layout::kContiguous},
                            HeadCase{1, 35, 3, 400, 2, 130, false, Layout::kContiguous}}) {
    for (const Layout layout : {Layout::kContiguous, Layout::kChannelsLast, Layout::kGaps}) {
      accumulate_into<S>(c, layout);
    }
  }
}

void accumulate_many_images() {
  const simt::ManyImages many;
  simt::SparseMemory sum(static_cast<size_t>(many.size.images) * 24 * 4);
  simt::Buffer<float> weight(std::vector<double>{0.5}, "weight");
  pydense::UpsampleAccumulateCudaArgs<float> args = {
      many.view, simt::axes_of<float>(many.size), sum.as<float>(), {}, weight.data(), {0, 0}};
  std::copy_n(simt::strides_of(2, 3, 4, Layout::kContiguous).begin(), 4, args.strides);
  simt::config().only_blocks = {0};
  upsample_accumulate_cuda(args, 0, nullptr);
  simt::config().only_blocks.clear();
  const float* const end = sum.as<float>() + many.size.images * 24;
  SIMT_EXPECT(end[-1] == 0.5F && end[-12] == 0.5F && end[-13] == 0);
  args.logits.images = 0;
  upsample_accumulate_cuda(args, 0, nullptr);
}

void count_accumulate(Layout layout, const char* shape) {
  HeadCase c = simt::kCounted;
  c.layout = layout;
  simt::Logits<float> logits(c);
  simt::Array<float> sum(1, c.classes, c.out_height, c.out_width, layout, "sum");
  sum.fill(9, 2);
  simt::Buffer<float> weight(32 * 256, "weight");
  simt::fill(weight, 10);
  pydense::UpsampleAccumulateCudaArgs<float> args = {
      logits.view(), simt::axes_of<float>(c), sum.data(), {}, weight.data(), {256, 1}};
  std::copy_n(sum.strides().begin(), 4, args.strides);
  const simt::Limits limits =
      simt::limits_of("upsample_accumulate_kernel", 4.0 * (19 * (8 * 64 + 2 * 32 * 256) + 32 * 256),
                      shape, simt::kCountedScale);
  simt::counted(limits, [&] { upsample_accumulate_cuda(args, 0, nullptr); });
}
void counters_of_accumulate() {
  count_accumulate(Layout::kContiguous, "1x19x256x512 to 1024x2048");
  count_accumulate(Layout::kChannelsLast, "1x19x256x512 to 1024x2048, channels last");
}

}  // namespace

int main(int argc, char** argv) {
  return simt::run_cases(
      argc, argv,
      {
          {"argmax, float", argmax<float, int64_t>},
          {"argmax, double", argmax<double, int32_t>},
          {"argmax, half", argmax<__half, uint8_t>},
          {"argmax, bfloat16", argmax<__nv_bfloat16, int64_t>},
          {"argmax in parts", [] { argmax_in_parts<float>(Layout::kContiguous); }},
          {"argmax in parts, double", [] { argmax_in_parts<double>(Layout::kChannelsLast); }},
          {"argmax of areas", argmax_of_areas},
          {"argmax of ties", argmax_of_ties},
          {"argmax beyond 32 bits", argmax_beyond_32_bits, simt::kRelease | simt::kAsan},
          {"argmax refuses", argmax_refuses},
          {"argmax of many images", argmax_of_many_images},
          {"softmax, float", softmax<float>},
          {"softmax, double", softmax<double>},
          {"softmax, half", softmax<__half>},
          {"softmax, bfloat16", softmax<__nv_bfloat16>},
          {"softmax of extremes", softmax_of_extremes},
          {"softmax of many images", softmax_of_many_images},
          {"softmax of no images", softmax_of_no_images},
          {"softmax beyond 32 bits", softmax_beyond_32_bits, simt::kRelease | simt::kAsan},
          {"softmax backward, float", softmax_backward<float>},
          {"softmax backward, double", softmax_backward<double>},
          {"softmax backward, half", softmax_backward<__half>},
          {"softmax backward, bfloat16", softmax_backward<__nv_bfloat16>},
          {"softmax backward in parts", softmax_backward_in_parts},
          {"accumulate, float", accumulate<float>},
          {"accumulate, double", accumulate<double>},
          {"accumulate, half", accumulate<__half>},
          {"accumulate, bfloat16", accumulate<__nv_bfloat16>},
          {"accumulate many images", accumulate_many_images},
          {"counters, argmax", counters_of_argmax},
          {"counters, softmax", counters_of_softmax},
          {"counters, softmax backward", counters_of_softmax_backward},
          {"counters, accumulate", counters_of_accumulate},
      });
}
