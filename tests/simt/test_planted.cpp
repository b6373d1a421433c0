// SPDX-License-Identifier: Apache-2.0
// The shim finds what it is there for: each planted mistake in the builds that can see its kind,
// and nothing in the same kernels without mistakes. Counters of known patterns are exact.
#include <array>
#include <map>

#include "driver.h"
#include "planted_gemm.cuh"
#include "planted_kernels.cuh"

namespace {

using namespace planted;  // NOLINT(google-build-using-namespace)

template <Bug B, class T>
void interpolation(int64_t rows, int n, int factor, double relative) {
  simt::Buffer<T> x(static_cast<size_t>(rows * n), "x");
  simt::Buffer<T> y(x.size() * static_cast<size_t>(factor), "y");
  simt::fill(x, 3);
  run_interpolate<B, T>(x.data(), y.data(), rows, n, factor);
  std::vector<double> expected(y.size());
  for (size_t i = 0; i < y.size(); ++i) {
    const auto length = static_cast<size_t>(n * factor);
    const double at = std::max((static_cast<double>(i % length) + 0.5) / factor - 0.5, 0.0);
    const auto left = std::min(static_cast<size_t>(at), static_cast<size_t>(n - 1));
    const size_t right = std::min(left + 1, static_cast<size_t>(n - 1));
    const T* row = x.data() + i / length * static_cast<size_t>(n);
    const double w = at - static_cast<double>(left);
    expected[i] = (1 - w) * to_float(row[left]) + w * to_float(row[right]);
  }
  simt::expect_close(y, expected, relative, relative);
}
template <Bug B>
void interpolations() {
  interpolation<B, float>(1, 1, 8, 1e-6);
  interpolation<B, float>(3, 17, 4, 1e-6);
  interpolation<B, float>(2, 64, 2, 1e-6);
  interpolation<B, __half>(2, 9, 3, 1e-3);
  interpolation<B, __nv_bfloat16>(2, 9, 3, 8e-3);
}
template <Bug B>
void many_rows() {
  interpolation<B, float>(65540, 1, 1, 0);
}
// Row 2^31 / 64 and the next, on memory that is not there.
template <Bug B>
void huge() {
  constexpr int64_t kRows = (int64_t{1} << 25) + 2;
  constexpr int kN = 64;
  simt::SparseMemory x(kRows * kN * sizeof(float));
  simt::SparseMemory y(kRows * kN * sizeof(float));
  const int64_t last = (kRows - 1) * kN;
  x.as<float>()[last] = 5;
  simt::config().only_blocks = {(kRows - 1) % 65535};
  run_interpolate<B, float>(x.as<float>(), y.as<float>(), kRows, kN, 1);
  simt::config().only_blocks.clear();
  SIMT_EXPECT(y.as<float>()[last] == 5);
}

template <Bug B>
void log_sum(int rows, int n, int threads, double scale) {
  simt::Buffer<float> x(static_cast<size_t>(rows) * n, "x");
  simt::Buffer<float> y(rows, "y");
  simt::fill(x, 5, scale);
  run_log_sum_exp<B>(x.data(), y.data(), rows, n, threads);
  std::vector<double> expected;
  for (int r = 0; r < rows; ++r) {
    const float* row = x.data() + static_cast<size_t>(r) * n;
    const double top = *std::max_element(row, row + n);
    double sum = 0;
    for (int i = 0; i < n; ++i) {
      sum += std::exp(row[i] - top);
    }
    expected.push_back(top + std::log(sum));
  }
  simt::expect_close(y, expected, 1e-6, 1e-5);
}
template <Bug B>
void log_sums() {
  log_sum<B>(3, 1000, 256, 3);
  log_sum<B>(3, 33, 128, 400);
  log_sum<B>(4, 7, 64, 400);
  log_sum<B>(2, 1, 32, 3);
}

template <Bug B>
void hashing(int n, int distinct, unsigned capacity) {
  simt::Buffer<unsigned long long> keys(n, "keys");
  simt::Buffer<unsigned long long> slots(capacity, "slots");
  simt::Buffer<int> ids(capacity, "ids");
  simt::Buffer<int> count(1, "count");
  simt::Buffer<int> slot_of(n, "slot_of");
  for (int i = 0; i < n; ++i) {
    keys[i] = static_cast<unsigned long long>(i * 7919 % distinct) * 0x9E3779B97F4A7C15U >> 1;
  }
  count[0] = 0;
  run_insert<B>({keys.data(), n, slots.data(), ids.data(), count.data(), slot_of.data(), capacity,
                 B == kShiftOfAllBits ? 64 : 32});
  std::map<unsigned long long, int> slot_of_key;
  std::vector<bool> id_used(static_cast<size_t>(n));
  for (int i = 0; i < n; ++i) {
    const int slot = slot_of[i];
    SIMT_EXPECT(slot >= 0 && slot < static_cast<int>(capacity) && slots[slot] == keys[i]);
    if (slot_of_key.emplace(keys[i], slot).second) {
      const int id = slot >= 0 && slot < static_cast<int>(capacity) ? ids[slot] : -1;
      SIMT_EXPECT(id >= 0 && id < count[0] && !id_used[static_cast<size_t>(id)]);
      id_used[static_cast<size_t>(std::max(id, 0))] = true;
    }
    SIMT_EXPECT(slot_of_key[keys[i]] == slot);
  }
  SIMT_EXPECT(count[0] == static_cast<int>(slot_of_key.size()));
}
template <Bug B>
void tables() {
  hashing<B>(600, 300, 512);
  hashing<B>(256, 1000, 256);
}

template <Bug B>
void scattering() {
  constexpr int kN = 700;
  simt::Buffer<float> x(kN, "x");
  simt::Buffer<float> y(17, "y");
  simt::Buffer<int> index(kN, "index");
  std::vector<double> expected(17);
  simt::fill(x, 11);
  std::fill(y.begin(), y.end(), 0.0F);
  for (int i = 0; i < kN; ++i) {
    index[i] = i * 31 % 17;
    expected[static_cast<size_t>(index[i])] += x[i];
  }
  run_scatter<B>(x.data(), y.data(), index.data(), kN);
  simt::expect_close(y, expected, 1e-5, 1e-5);
}

template <Bug B, class T>
void product(int m, int n, int k) {
  simt::Buffer<T> a(static_cast<size_t>(m) * k, "a");
  simt::Buffer<T> b(static_cast<size_t>(k) * n, "b");
  simt::Buffer<float> c(static_cast<size_t>(m) * n, "c");
  simt::fill(a, 1);
  simt::fill(b, 2);
  run_gemm<B, T>({a.data(), b.data(), c.data(), m, n, k});
  std::vector<double> expected(c.size());
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      for (int l = 0; l < k; ++l) {
        expected[static_cast<size_t>(i) * n + j] +=
            static_cast<double>(to_float(a[static_cast<size_t>(i) * k + l])) *
            to_float(b[static_cast<size_t>(l) * n + j]);
      }
    }
  }
  simt::expect_close(c, expected, 1e-5, 1e-5);
}
template <Bug B>
void products() {
  product<B, __half>(64, 64, 72);
  product<B, __nv_bfloat16>(40, 72, 104);
}

struct Planted {
  const char* name;
  void (*run)();
  unsigned builds;  // that must find it
};
constexpr unsigned kAddresses = simt::kAsan | simt::kTrace;
constexpr unsigned kRaces = simt::kTrace;
const Planted kPlanted[] = {
    {"clamp of the right neighbour lost", interpolations<kLostClamp>, simt::kEverywhere},
    {"tail off by one", interpolations<kTailOffByOne>, simt::kEverywhere},
    {"read past the row", interpolations<kReadPastTheRow>, simt::kEverywhere},
    {"grid above 65535", many_rows<kGridTooHigh>, simt::kEverywhere},
    {"32-bit index", huge<kIndexOf32Bits>, simt::kRelease | simt::kAsan},
    {"mask names lanes that do not come", log_sums<kMaskOfAbsentLanes>, simt::kEverywhere},
    {"shared memory reused without barrier", log_sums<kSharedReusedWithoutBarrier>, kRaces},
    {"missing barrier", log_sums<kMissingBarrier>, simt::kEverywhere},
    {"uninitialised shared memory", log_sums<kUninitialisedShared>, simt::kRelease | kRaces},
    {"divergent barrier", log_sums<kDivergentBarrier>, simt::kEverywhere},
    {"misaligned vector", log_sums<kMisalignedVector>, simt::kEverywhere},
    {"return before a shuffle", log_sums<kReturnBeforeShuffle>, simt::kEverywhere},
    {"write past a shared array", log_sums<kSharedOverrun>, simt::kEverywhere},
    {"shift by all bits", tables<kShiftOfAllBits>, simt::kAsan},
    {"insert without atomics", tables<kPlainInsert>, kRaces},
    {"counter without atomics", tables<kPlainCounter>, kRaces},
    {"read of what others still write", tables<kUnsynchronisedRead>, kRaces},
    {"probe without wrap-round", tables<kProbeWithoutWrap>, kAddresses},
    {"scatter without atomics", scattering<kScatterWithoutAtomics>, kRaces},
    {"wait for too few groups", products<kWaitsForTooFewGroups>, simt::kEverywhere},
    {"stage overwritten while read", products<kStageOverwritten>, kRaces},
};

void (*const kCorrect[])() = {interpolations<kNone>, log_sums<kNone>, tables<kNone>,
                              scattering<kNone>, products<kNone>};

void every_planted_mistake_is_found() {
  for (void (*run)() : kCorrect) {
    SIMT_EXPECT(!simt::is_caught(run));
  }
  for (const Planted& planted : kPlanted) {
    if ((planted.builds & simt::this_build()) != 0 && !simt::is_caught(planted.run)) {
      simt::report_failure(planted.name, 0, "not found");
    }
  }
}

// What a report says; after one, launches go on.
void reports_name_both_places() {
  std::string text;
  for (int tries = 0; tries < 8 && text.empty(); ++tries) {
    simt::config().seed += 100;
    try {
      log_sums<kSharedReusedWithoutBarrier>();
    } catch (const simt::Error& error) {
      text = error.what();
    }
  }
  const auto has = [&](const char* part) { return text.find(part) != std::string::npos; };
  SIMT_EXPECT(has("log_sum_exp<B>: race on shared memory: "));
  SIMT_EXPECT(has("read by thread ") && has("write by thread ") &&
              has(" of the block at planted_"));
  SIMT_EXPECT(text.find("planted_kernels.cuh:") != text.rfind("planted_kernels.cuh:"));
  log_sums<kNone>();
}

// ---- counters -----------------------------------------------------------------------------------
__global__ void strided_copy(const float* x, float* y, int stride) {
  y[threadIdx.x * static_cast<unsigned>(stride)] = x[threadIdx.x];
}
__global__ void strided_shared(float* y, int stride) {
  PYDENSE_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x * static_cast<unsigned>(stride)] = 1.0F;
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x * static_cast<unsigned>(stride)];
}
__global__ void vectors(const float* x, float* y) {
  pydense::store_vector(y + 4 * threadIdx.x, pydense::load_vector<4>(x + 4 * threadIdx.x));
}

simt::Counts counts_of(const std::function<void()>& launch) {
  simt::start_counting();
  launch();
  const auto counted = simt::stop_counting(false);
  SIMT_EXPECT(counted.size() == 1 && counted.begin()->second.launches == 1);
  return counted.begin()->second.counts;
}

void counters_are_exact() {
  simt::Buffer<float> x(64, "x");
  simt::Buffer<float> y(32 * 64, "y");
  simt::fill(x, 1);
  const auto config = [](unsigned threads, size_t shared) {
    return pydense::LaunchConfig{dim3(1), dim3(threads), shared, 0, nullptr};
  };
  for (const unsigned stride : {1U, 2U, 8U, 32U}) {
    const simt::Counts counts = counts_of([&] {
      PYDENSE_LAUNCH(strided_copy, config(64, 0), x.data(), y.data(), static_cast<int>(stride));
    });
    const uint64_t write_sectors = 2 * std::min(32U, 4 * stride);
    SIMT_EXPECT(counts.requests == 4);
    SIMT_EXPECT(counts.sectors == 8 + write_sectors);
    SIMT_EXPECT(counts.ideal_sectors == 16);
    SIMT_EXPECT(counts.moved_bytes == 32 * counts.sectors);
    const simt::Counts shared = counts_of([&] {
      PYDENSE_LAUNCH(strided_shared, config(64, 64 * 32 * sizeof(float)), y.data(),
                     static_cast<int>(stride));
    });
    SIMT_EXPECT(shared.shared_requests == 4);
    SIMT_EXPECT(shared.wavefronts == uint64_t{4} * stride);
    SIMT_EXPECT(shared.ideal_wavefronts == 4);
    SIMT_EXPECT(counts.dynamic_shared == 0 && shared.dynamic_shared == 64 * 32 * sizeof(float));
  }
  const simt::Counts wide =
      counts_of([&] { PYDENSE_LAUNCH(vectors, config(16, 0), x.data(), y.data()); });
  SIMT_EXPECT(wide.requests == 2 && wide.sectors == 16 && wide.ideal_sectors == 16);
  simt::Buffer<__half> operand(64 * 64, "operand");
  simt::Buffer<float> product(64 * 64, "product");
  simt::fill(operand, 2);
  const planted::Gemm<__half> gemm = {operand.data(), operand.data(), product.data(), 64, 64, 64};
  const simt::Counts tensor = counts_of([&] { planted::run_gemm<planted::kNone>(gemm); });
  SIMT_EXPECT(tensor.matrix_products == 4 * 8 * 4);
  SIMT_EXPECT(tensor.moved_bytes == 64 * 64 * (2 + 4));
}

// Limits are held, and want the names of all kernels and reasons for what is unusual.
void limits_are_held() {
  simt::Buffer<float> x(64, "x");
  simt::Buffer<float> y(32 * 64, "y");
  simt::fill(x, 1);
  const auto copy = [&] {
    PYDENSE_LAUNCH(strided_copy, (pydense::LaunchConfig{dim3(1), dim3(64), 0, 0, nullptr}),
                   x.data(), y.data(), 2);
  };
  simt::Limits limits{.kernel = "strided_copy", .minimum_bytes = 512};
  limits.moved = limits.sectors = 1.5;
  limits.reason = "every other float is written";
  simt::counted(limits, copy);
  SIMT_EXPECT(simt::failure_count() == 0);
  const auto fails = [&](const std::vector<simt::Limits>& all) {
    return simt::is_caught([&] { simt::counted(all, copy); });
  };
  simt::Limits tight = limits;
  tight.moved = 1.4;
  simt::Limits silent = limits;
  silent.reason = "";
  simt::Limits other = limits;
  other.kernel = "another";
  simt::Limits wrong = limits;
  wrong.minimum_bytes = 5120;
  SIMT_EXPECT(!fails({limits}));
  SIMT_EXPECT(fails({tight}) && fails({silent}) && fails({other}) && fails({wrong}));
  SIMT_EXPECT(fails({}) && fails({limits, other}));
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<simt::Case> cases = {
      {"interpolate", interpolations<kNone>},
      {"interpolate 65540 rows", many_rows<kNone>, simt::kRelease},
      {"interpolate past 2^31 elements", huge<kNone>, simt::kRelease | simt::kAsan},
      {"log-sum-exp", log_sums<kNone>},
      {"hash table", tables<kNone>},
      {"scatter", scattering<kNone>},
      {"tensor-core product", products<kNone>},
      {"reports name both places", reports_name_both_places, simt::kTrace},
      {"counters are exact", counters_are_exact, simt::kTrace},
      {"limits are held", limits_are_held, simt::kTrace},
  };
  const int status = simt::run_cases(argc, argv, cases);
  every_planted_mistake_is_found();
  std::printf("%d planted mistakes not found\n", simt::failure_count());
  return status != 0 || simt::failure_count() != 0 ? 1 : 0;
}
