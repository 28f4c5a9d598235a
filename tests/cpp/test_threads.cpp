// One open file, used by a hundred threads at once, in every way there is; and several encoders side by side. Meant
// to be run under ThreadSanitizer (make test-threads).
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <map>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "sample.h"

using namespace tallcodec;

namespace {

// Runs body(number) in so many threads, none of which begins before all are there. Gives how many calls were false.
template <class Body>
int in_threads(int threads, Body body) {
  std::atomic<int> waiting{threads}, wrong{0};
  std::vector<std::thread> all;
  for (int i = 0; i < threads; ++i) {
    all.emplace_back([&, i] {
      for (--waiting; waiting > 0;) std::this_thread::yield();
      wrong += !body(i);
    });
  }
  for (auto& thread : all) thread.join();
  return wrong;
}

using Decoded = std::map<std::pair<uint32_t, uint32_t>, Bytes>;  // by task and tensor

// All tensors of a task, of the base where it is kNone, in one call.
Decoded decode(const File& file, uint32_t task, const std::vector<float>& base, Options options) {
  Decoded out;
  std::vector<Request> requests;
  for (uint32_t i = 0; i < file.index().tensors.size(); ++i) {
    if (!file.has(task, i)) continue;
    Bytes& bytes = out[{task, i}];
    bytes.resize(file.info(task, i).nbytes);
    requests.push_back({task, i, bytes.data(), file.needs_base(task, i) ? source(base) : Source{}});
  }
  file.decode(requests, options);
  return out;
}

Loaded load(const File& file, uint32_t task, const std::vector<float>& base, const Options& options) {
  std::vector<Request> requests;
  for (uint32_t i = 0; i < file.index().tensors.size(); ++i) {
    if (!file.has(task, i)) continue;
    requests.push_back({task, i, nullptr, file.needs_base(task, i) ? source(base) : Source{}});
  }
  return file.load(task, requests, options);
}

// What else a file gives: a merged model, counts, checks, side files.
struct Rest {
  Bytes merged;
  std::vector<uint64_t> counts;
  size_t damage;
  Bytes side_file;

  bool operator==(const Rest& o) const {
    return merged == o.merged && counts == o.counts && damage == o.damage && side_file == o.side_file;
  }
};

Rest rest_of(const File& file, const std::vector<float>& base, const Options& options) {
  const uint32_t weight = file.find_tensor("weight");
  Rest rest;
  rest.merged.resize(file.info(kNone, weight).nbytes);
  const Source external = file.needs_base(kNone, weight) ? source(base) : Source{};
  file.merge({{kNone, weight, rest.merged.data(), external}}, {2, 0.5f}, options);
  const MaskCounts counts = file.count_masks({weight}, options).at(0);
  rest.counts = counts.overlap;
  rest.counts.insert(rest.counts.end(), counts.agreement.begin(), counts.agreement.end());
  rest.damage = file.verify(options).size();
  rest.side_file = file.read_plane(file.index().files.at(0).plane, options);
  return rest;
}

void use_one_file(const Bytes& bytes, const std::vector<float>& base) {
  File file("test.tall", bytes.size(), [&](uint64_t offset, uint64_t) { return bytes.data() + offset; });
  const uint32_t tasks = uint32_t(file.index().tasks.size());
  Options alone;
  std::vector<Decoded> expected;
  for (uint32_t k = 0; k <= tasks; ++k) expected.push_back(decode(file, k < tasks ? k : kNone, base, alone));
  const Rest rest = rest_of(file, base, alone);
  CHECK(rest.damage == 0);
  const Loaded shared = load(file, 2, base, alone);

  CHECK(in_threads(100, [&](int number) {
    Options options;
    options.threads = 1 + number % 2;
    std::atomic<int> polls{0};
    options.poll = [&](const char*, uint64_t, uint64_t) { ++polls; };
    const uint32_t k = uint32_t(number) / 5 % (tasks + 1), task = k < tasks ? k : kNone;
    switch (number % 5) {
      case 0: {
        const Loaded own = load(file, task, base, options);
        options.loaded = &own;
        return decode(file, task, base, options) == expected[k];
      }
      case 1: options.loaded = &shared; return decode(file, 2, base, options) == expected[2];
      case 2: return rest_of(file, base, options) == rest && polls > 0;
      default: return decode(file, task, base, options) == expected[k];
    }
  }) == 0);
}

}  // namespace

int main() {
  // Found out once, by whoever is first.
  CHECK(in_threads(16, [](int) { return find_kernels() == available_kernels()[0]; }) == 0);

  const std::vector<float> base = random_base(6 * 90'000);  // of more than a unit
  Recipe coded, rows;
  coded.code_masks = true;
  rows.scale = ScaleMode::UnitGainRow;
  rows.storage = BaseStorage::Referenced;
  for (const auto& [recipe, shared] : {std::pair{coded, DType::F32}, {rows, DType::I8}}) {
    const Bytes file = encode(*available_kernels(), recipe, shared, base);
    use_one_file(file, base);
    const bool same = in_threads(2, [&, recipe = recipe, shared = shared](int) {
      return encode(*available_kernels(), recipe, shared, base) == file;
    }) == 0;
    CHECK(same);
  }
  std::printf("threads: %d passed, %d failed\n", passed, failed);
  return failed != 0;
}
