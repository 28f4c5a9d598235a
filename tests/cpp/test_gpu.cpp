// The GPU's programs where no test of whole tensors can go: behind 2^31 and 2^32 elements. Memory is reserved, not
// used, but for the pages around the end.
#include <sys/mman.h>

#include <cstdlib>

#include "../../csrc/kernels_cuda_host.cpp"
#include "check.h"

using namespace tallcodec;

namespace {

constexpr uint64_t kElements = (uint64_t{1} << 33) + 4099;
constexpr uint64_t kLast = 8192;  // elements that are looked at

class Reserved {
 public:
  explicit Reserved(uint64_t bytes) : size_(bytes) {
    void* const found = ::mmap(nullptr, size_, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) std::exit(1);
    memory = static_cast<uint8_t*>(found);
  }
  ~Reserved() { ::munmap(memory, size_); }

  uint8_t* memory;

 private:
  uint64_t size_;
};

template <class Program>
void run_last_warps(const Program& program, uint64_t warps, uint64_t last) {
  std::vector<uint32_t> counters(64);
  for (uint64_t i = warps < last ? 0 : warps - last; i < warps; ++i) {
    Warp warp(i, counters.data());
    program(warp);
  }
}

uint32_t noise(uint64_t i) { return uint32_t((i * 0x9e3779b97f4a7c15) >> 40); }

void fill(uint16_t* base, int8_t* shared, uint8_t* mask, float* scales) {
  for (uint64_t i = kElements - kLast; i < kElements; ++i) {
    base[i] = uint16_t(0x3c00 + noise(i) % 512);
    shared[i] = int8_t(noise(i + 1) % 255 - 127);
    mask[i / 8] = uint8_t(noise(i / 8 + 2));
    scales[i / kScaleBlock] = 0.001f * float(noise(i / kScaleBlock) % 100);
  }
}

void test_decode_behind_two_to_the_33() {
  Reserved base(2 * kElements), shared(kElements), mask(kElements / 8 + 1), out(2 * kElements), expected(2 * kLast),
      scales(kElements / 32 + 4);
  const auto values = reinterpret_cast<uint16_t*>(base.memory);
  const auto factors = reinterpret_cast<float*>(scales.memory);
  fill(values, reinterpret_cast<int8_t*>(shared.memory), mask.memory, factors);
  GpuBlock g{};
  g.block.n = kElements;
  g.block.base = base.memory;
  g.block.base_dtype = g.block.out_dtype = DType::BF16;
  g.block.shared = shared.memory;
  g.block.shared_dtype = DType::I8;
  g.block.shared_scales = factors;
  g.block.mask = mask.memory;
  g.block.scale = 1.5f;
  g.block.out = out.memory;

  DecodeBlock d = g.block;
  const uint64_t first = (kElements - kLast) / kScaleBlock * kScaleBlock + kScaleBlock;
  d.n = kElements - first;
  d.base = values + first;
  d.shared = shared.memory + first;
  d.shared_scales = factors + first / kScaleBlock;
  d.mask = mask.memory + first / 8;
  d.out = expected.memory;
  kernels_scalar.decode(d);

  const auto compare = [&](auto program) {
    using Program = decltype(program);
    std::memset(out.memory + 2 * first, 0, 2 * d.n);
    program.batch.block[0] = g;
    const uint64_t tiles = blocks_of(kElements, Program::kTile);
    for (uint32_t b = 1; b <= kBatch; ++b) program.batch.first_tile[b] = tiles;
    run_last_warps(program, tiles, kLast / Program::kTile + 1);
    CHECK(std::memcmp(out.memory + 2 * first, expected.memory, 2 * d.n) == 0);
  };
  compare(DecodeVectors<BF16, I8>{});
  compare(DecodeElements{});
}

void test_encode_behind_two_to_the_33() {
  Reserved base(2 * kElements), task(2 * kElements), shared(2 * kElements), mask(kElements / 8 + 1);
  const auto b = reinterpret_cast<uint16_t*>(base.memory), t = reinterpret_cast<uint16_t*>(task.memory);
  for (uint64_t i = kElements - kLast; i < kElements; ++i) {
    b[i] = uint16_t(0x3c00 + noise(i) % 512);
    t[i] = uint16_t(0x3c00 + noise(i + 7) % 512);
  }
  int64_t set[2] = {}, agreement[3] = {};
  int32_t nonfinite[2] = {};
  GpuEncode e{};
  e.n = kElements;
  e.base = b;
  e.base_dtype = e.shared_dtype = DType::BF16;
  e.rule = MaskRule::Published;
  e.tasks = 1;
  e.held[0] = {t, mask.memory, 0.4f, DType::BF16};
  e.task = e.held;
  e.shared = shared.memory;
  e.set_bits = e.published_bits = set;
  e.agreement = agreement;
  e.nonfinite = nonfinite;
  const uint64_t first = kElements / kScaleBlock * kScaleBlock - 32 * kScaleBlock, n = kElements - first;
  e.first = first;
  run_last_warps(Encode<ElementSource>{e}, 2, 2);

  std::vector<uint16_t> expected(n);
  std::vector<uint8_t> expected_mask((n + 7) / 8);
  const void* const tasks[] = {t + first};
  uint8_t* const masks[] = {expected_mask.data()};
  const DType dtype = DType::BF16;
  const float threshold = 0.4f;
  TaskStats stats{};
  uint64_t agree[2] = {};
  EncodeBlock block{};
  block.n = n;
  block.tasks = 1;
  block.base = b + first;
  block.base_dtype = block.shared_dtype = dtype;
  block.task = tasks;
  block.task_dtype = &dtype;
  block.threshold = &threshold;
  block.shared = expected.data();
  block.mask = masks;
  block.stats = &stats;
  block.agreement = agree;
  kernels_scalar.encode(block);
  CHECK(stats.set_bits > 0);
  CHECK(std::memcmp(shared.memory + 2 * first, expected.data(), 2 * n) == 0);
  CHECK(std::memcmp(mask.memory + first / 8, expected_mask.data(), expected_mask.size()) == 0);
}

}  // namespace

int main() {
  test_decode_behind_two_to_the_33();
  test_encode_behind_two_to_the_33();
  std::printf("%d checks passed, %d failed\n", passed, failed);
  return failed != 0;
}
