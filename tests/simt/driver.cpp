// SPDX-License-Identifier: Apache-2.0
#include "driver.h"

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstring>

namespace simt {
namespace {

struct Options {
  int schedules = 4;
  const char* only = "";
  const char* counters = nullptr;
  bool lines = false;
  bool first_failure = false;  // and no further
};
Options options;
int failures = 0;
std::string json;  // a line for each counted launch of the first schedule

void set_schedule(int number) {
  config().seed = 1 + static_cast<uint64_t>(number);
  config().order = number == 0 ? Order::kForward : number == 1 ? Order::kReverse : Order::kRandom;
}

// One schedule; the text of an error, "" for none.
std::string attempt(const std::function<void()>& run) {
  try {
    run();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

void hold(const Limits& limits, const char* what, double measured, double limit, double usual) {
  if (measured > limit) {
    report_failure(limits.kernel, 0,
                   std::string(what) + " " + std::to_string(measured) + " is above the limit " +
                       std::to_string(limit));
  }
  if (limit > usual && limits.reason[0] == '\0') {
    report_failure(limits.kernel, 0, std::string(what) + ": a higher limit needs a reason");
  }
}

unsigned long long number(uint64_t n) { return n; }

double ratio(uint64_t a, uint64_t b) {
  return b == 0 ? 1.0 : static_cast<double>(a) / static_cast<double>(b);
}

void write_json(const Limits& limits, const Counted& counted) {
  const Counts& counts = counted.counts;
  const auto text = [](const char* key, const char* value) {
    json += std::string("\"") + key + "\": \"" + value + "\", ";
  };
  const auto real = [](const char* key, double value) {
    std::array<char, 60> printed{};
    std::snprintf(printed.data(), printed.size(), "\"%s\": %.9g, ", key, value);
    json += printed.data();
  };
  json += "{";
  text("kernel", limits.kernel);
  text("shape", limits.shape);
  text("reason", limits.reason);
  real("scale", limits.scale);
  real("minimum_bytes", limits.minimum_bytes);
  const std::pair<const char*, uint64_t> numbers[] = {
      {"launches", counted.launches},
      {"moved_bytes", counts.moved_bytes},
      {"sectors", counts.sectors},
      {"ideal_sectors", counts.ideal_sectors},
      {"wavefronts", counts.wavefronts},
      {"ideal_wavefronts", counts.ideal_wavefronts},
      {"matrix_products", counts.matrix_products},
      {"dynamic_shared", counts.dynamic_shared},
  };
  for (const auto& [key, value] : numbers) {
    json += std::string("\"") + key + "\": " + std::to_string(value) + ", ";
  }
  json += "\"blocks\": [";
  for (size_t i = 0; i < counted.blocks.size(); ++i) {
    json += (i == 0 ? "[" : ", [") + std::to_string(counted.blocks[i].address) + ", " +
            std::to_string(counted.blocks[i].warps) + "]";
  }
  json += "]}\n";
}

void judge(const Limits& limits, const Counted& counted) {
  const Counts& counts = counted.counts;
  for (const LineCounts& line : counted.lines) {
    std::printf("  %-32s %-6s %-5s %9llu requests, %.2f %s (%.2f ideal)\n", line.line.c_str(),
                line.shared ? "shared" : "global", line.write ? "write" : "read",
                number(line.requests), ratio(line.units, line.requests),
                line.shared ? "wavefronts" : "sectors", ratio(line.ideal, line.requests));
  }
  const double moved = static_cast<double>(counts.moved_bytes) / limits.minimum_bytes;
  const double sectors = ratio(counts.sectors, counts.ideal_sectors);
  const double wavefronts = ratio(counts.wavefronts, counts.ideal_wavefronts);
  const Limits usual = {"", 0};
  if (moved < 0.999) {
    report_failure(limits.kernel, 0,
                   "moved only " + std::to_string(moved) + " of the minimum: it is wrong");
  }
  hold(limits, "moved bytes / minimum", moved, limits.moved, usual.moved);
  hold(limits, "sectors / ideal", sectors, limits.sectors, usual.sectors);
  hold(limits, "wavefronts / ideal", wavefronts, limits.wavefronts, usual.wavefronts);
  write_json(limits, counted);
}

}  // namespace

SparseMemory::SparseMemory(size_t bytes)
    : bytes_(bytes),
      memory_(mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
  if (memory_ == MAP_FAILED) {
    throw std::bad_alloc();
  }
}
SparseMemory::~SparseMemory() { munmap(memory_, bytes_); }

std::vector<double> random_values(size_t n, uint64_t seed, double scale) {
  std::mt19937_64 generator(seed);
  std::vector<double> values(n);
  for (double& value : values) {
    // 24 bits: exact in float, and not left to the library's distributions.
    value = (static_cast<double>(generator() >> 40) / 0x1p23 - 1) * scale;
  }
  return values;
}

void report_failure(const char* file, int line, const std::string& what) {
  if (++failures <= 5) {
    std::printf("  %s:%d: failed: %s\n", file, line, what.c_str());
  }
}

int failure_count() { return failures; }

void expect_close_at(const char* file, int line, double got, double expected, double relative,
                     double absolute, size_t index) {
  if (std::isnan(expected) ? std::isnan(got)
                           : got == expected || std::fabs(got - expected) <=
                                                    absolute + relative * std::fabs(expected)) {
    return;
  }
  std::array<char, 120> text{};
  std::snprintf(text.data(), text.size(), "element %zu is %.9g, expected %.9g", index, got,
                expected);
  report_failure(file, line, text.data());
}

Builds this_build() {
#ifdef SIMT_ASAN
  return kAsan;
#else
  return counting_is_possible() ? kTrace : kRelease;
#endif
}

void counted(const std::vector<Limits>& limits, const std::function<void()>& launch) {
  // The order of threads does not change what is counted.
  if (this_build() != kTrace || config().order != Order::kForward) {
    launch();
    return;
  }
  start_counting();
  try {
    launch();
  } catch (...) {
    stop_counting(false);
    throw;
  }
  std::map<std::string, Counted> found = stop_counting(options.lines);
  for (const Limits& limit : limits) {
    const auto at = found.find(limit.kernel);
    if (at == found.end()) {
      report_failure(limit.kernel, 0, "is not launched");
    } else {
      judge(limit, at->second);
      found.erase(at);
    }
  }
  for (const auto& [kernel, counted] : found) {
    report_failure(kernel.c_str(), 0, "is launched, but has no limits");
  }
}

int run_cases(int argc, char** argv, const std::vector<Case>& cases) {
  for (int i = 1; i < argc; ++i) {
    const bool has_value = i + 1 < argc;
    if (std::strcmp(argv[i], "--lines") == 0) {
      options.lines = true;
    } else if (std::strcmp(argv[i], "--first-failure") == 0) {
      options.first_failure = true;
    } else if (std::strcmp(argv[i], "--schedules") == 0 && has_value) {
      options.schedules = static_cast<int>(std::strtol(argv[++i], nullptr, 10));
    } else if (std::strcmp(argv[i], "--only") == 0 && has_value) {
      options.only = argv[++i];
    } else if (std::strcmp(argv[i], "--counters") == 0 && has_value) {
      options.counters = argv[++i];
    } else {
      std::printf(
          "usage: %s [--schedules N] [--only TEXT] [--counters FILE] [--lines] [--first-failure]\n",
          argv[0]);
      return 2;
    }
  }
  int failed = 0;
  int ran = 0;
  for (const Case& one : cases) {
    if (std::strstr(one.name, options.only) == nullptr || (one.builds & this_build()) == 0) {
      continue;
    }
    if (failed > 0 && options.first_failure) {
      break;
    }
    const auto start = std::chrono::steady_clock::now();
    const Stats before = stats();
    failures = 0;
    std::string error;
    for (int schedule = 0; schedule < options.schedules && failures == 0 && error.empty();
         ++schedule) {
      set_schedule(schedule);
      error = attempt(one.run);
    }
    const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - start;
    const bool ok = failures == 0 && error.empty();
    ++ran;
    failed += ok ? 0 : 1;
    std::printf("%-6s %-44s %8.1f ms, %llu launches, %llu threads%s%s\n", ok ? "ok" : "FAILED",
                one.name, time.count(), number(stats().launches - before.launches),
                number(stats().threads - before.threads), error.empty() ? "" : "\n  ",
                error.c_str());
    std::fflush(stdout);
  }
  if (options.counters != nullptr) {
    FILE* file = std::fopen(options.counters, "w");
    if (file == nullptr || std::fputs(json.c_str(), file) < 0 || std::fclose(file) != 0) {
      std::printf("cannot write %s\n", options.counters);
      return 1;
    }
  }
  std::printf("%d passed, %d failed\n", ran - failed, failed);
  return failed == 0 && ran > 0 ? 0 : 1;
}

bool is_caught(const std::function<void()>& run) {
  for (int schedule = 0; schedule < options.schedules; ++schedule) {
    std::fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
      const bool null = std::freopen("/dev/null", "w", stdout) != nullptr &&
                        std::freopen("/dev/null", "w", stderr) != nullptr;
      set_schedule(schedule);
      failures = 0;
      const std::string error = attempt(run);
      _exit(null && error.empty() && failures == 0 ? 0 : 1);
    }
    int status = 0;
    if (child < 0 || waitpid(child, &status, 0) != child) {
      throw std::runtime_error("fork failed");
    }
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
      return true;
    }
  }
  return false;
}

}  // namespace simt
