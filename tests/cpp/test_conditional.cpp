// Conditional masks: what is coded comes back, takes the bits it should, and no bytes whatever make the
// decoder read or write where it must not (the sanitizers watch).
#include "conditional.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "kernels.h"
#include "tallcodec.h"

using namespace tallcodec;

namespace {

using Bits = std::vector<uint8_t>;

// A shared vector, and a mask that follows its magnitude, in runs of elements with and without bits.
struct Case {
  uint64_t n;
  DType dtype;
  std::vector<float> s;
  std::vector<uint8_t> stored;
  std::vector<float> scales;
  Bits mask;

  SharedBlock shared() const {
    return {stored.data(), dtype, dtype == DType::I8 ? scales.data() : nullptr};
  }
};

Case random_case(std::mt19937_64& random, uint64_t n, DType dtype, double density) {
  Case c{n, dtype, std::vector<float>(n), {}, {}, Bits((n + 7) / 8)};
  std::normal_distribution<float> normal;
  c.stored.resize(n * size_of(dtype));
  for (uint64_t b = 0; b < (n + kScaleBlock - 1) / kScaleBlock; ++b) c.scales.push_back(std::ldexp(1.0f, int(b % 9)));
  for (uint64_t i = 0; i < n; ++i) {
    float s = random() % 5 ? normal(random) : 0;
    if (dtype == DType::I8) {
      const auto q = int8_t(std::clamp(s * 40, -127.0f, 127.0f));
      c.stored[i] = uint8_t(q);
      s = float(q) * c.scales[i / kScaleBlock];
    } else {
      uint32_t bits;
      std::memcpy(&bits, &s, sizeof bits);
      if (dtype != DType::F32) bits &= 0xffff0000;  // of bfloat16; as float16 any bits will do
      std::memcpy(&s, &bits, sizeof bits);
      if (dtype == DType::F32) {
        std::memcpy(&c.stored[4 * i], &bits, 4);
      } else {
        const uint16_t half = dtype == DType::BF16 ? uint16_t(bits >> 16) : uint16_t(random() & 0x7bff);
        std::memcpy(&c.stored[2 * i], &half, 2);
        if (dtype == DType::F16) s = half ? 1.0f : 0.0f;
      }
    }
    c.s[i] = s;
    const bool quiet = i / 300 % 3 == 1;
    const double p = std::min(1.0, density * (std::fabs(s) < 1 ? 0.5 : 1.5));
    if (s != 0 && !quiet && std::bernoulli_distribution(p)(random)) {
      c.mask[i / 8] = uint8_t(c.mask[i / 8] | 1 << i % 8);
    }
  }
  return c;
}

// Decodes a copy of exactly the bytes' size; false where it is not sound.
bool decode(const std::string& coded, const Case& c, const Kernels& kernels, Bits& mask) {
  mask.assign(c.mask.size(), 0xaa);
  std::unique_ptr<uint8_t[]> bytes(new uint8_t[coded.size()]);
  std::copy(coded.begin(), coded.end(), bytes.get());
  try {
    decode_mask(bytes.get(), coded.size(), c.shared(), c.n, kernels, mask.data());
    return true;
  } catch (const Error& e) {
    CHECK(e.status == Status::Format);
    return false;
  }
}

// By every kernel variant, which agree.
bool decode(const std::string& coded, const Case& c, Bits& mask) {
  const bool sound = decode(coded, c, kernels_scalar, mask);
  for (auto kernels = available_kernels(); *kernels; ++kernels) {
    Bits other;
    CHECK(decode(coded, c, **kernels, other) == sound);
    if (sound) check(other == mask, "%s, n=%d", (*kernels)->name, int(c.n));
  }
  return sound;
}

std::string code(const Case& c) { return code_mask(c.mask.data(), c.shared(), c.n); }

constexpr DType kTypes[] = {DType::F32, DType::F16, DType::BF16, DType::I8};

void test_round_trip() {
  std::mt19937_64 random(1);
  for (DType dtype : kTypes) {
    for (uint64_t n : {1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1000, 70001}) {
      for (double density : {0.0, 0.001, 0.1, 0.5, 2.0}) {
        const Case c = random_case(random, n, dtype, density);
        Bits back;
        CHECK(decode(code(c), c, back));
        check(back == c.mask, "dtype=%d n=%d density=%g", int(dtype), int(n), density);
      }
    }
  }
  const Case c = random_case(random, kMaskBlock, DType::F32, 0.4);
  Bits back;
  CHECK(decode(code(c), c, back) && back == c.mask);
}

// Of bits that depend on the size of s alone a block takes at most half a percent more than their entropy.
void test_bits() {
  std::mt19937_64 random(2);
  Case c = random_case(random, kMaskBlock, DType::F32, 0);
  double entropy = 0;
  for (uint64_t i = 0; i < c.n; ++i) {
    if (c.s[i] == 0) continue;
    const double p = std::fabs(c.s[i]) < 0.5 ? 0.1 : std::fabs(c.s[i]) < 1 ? 0.45 : 0.02;
    entropy -= p * std::log2(p) + (1 - p) * std::log2(1 - p);
    if (std::bernoulli_distribution(p)(random)) c.mask[i / 8] = uint8_t(c.mask[i / 8] | 1 << i % 8);
  }
  const double bits = 8.0 * double(code(c).size());
  check(bits < 1.005 * entropy, "%g bits of %g", bits, entropy);
}

// A shared vector that no writer makes: of NaNs, and of others than the mask was coded with.
void test_another_shared_vector() {
  std::mt19937_64 random(4);
  for (DType dtype : kTypes) {
    for (int round = 0; round < 200; ++round) {
      Case c = random_case(random, 2000, dtype, 0.3);
      const std::string coded = code(c);
      for (int k = 0; k < 5; ++k) {
        const uint64_t i = random() % c.stored.size();
        for (uint64_t at = i; at < std::min(i + 4, c.stored.size()); ++at) c.stored[at] = 0x7f;
      }
      if (dtype == DType::I8) c.scales[random() % c.scales.size()] = round % 2 ? INFINITY : NAN;
      Bits unused;
      decode(coded, c, unused);  // refused or not
    }
  }
}

void test_damage() {
  std::mt19937_64 random(3);
  int refused = 0, rounds = 0;
  for (; rounds < 4000; ++rounds) {
    const Case c = random_case(random, 1 + random() % 3000, kTypes[random() % 4], double(random() % 100) / 100);
    std::string coded = code(c);
    if (coded.empty()) continue;
    switch (random() % 3) {
      case 0: coded.resize(random() % coded.size()); break;
      case 1: coded.insert(random() % coded.size(), 1 + random() % 9, char(random())); break;
      default:
        for (uint64_t k = 1 + random() % 4; k-- > 0;) coded[random() % coded.size()] = char(random());
    }
    Bits back;
    refused += !decode(coded, c, back);
  }
  CHECK(refused > rounds / 2);
}

}  // namespace

int main() {
  test_round_trip();
  test_bits();
  test_another_shared_vector();
  test_damage();
  std::printf("%d checks passed, %d failed\n", passed, failed);
  return failed != 0;
}
