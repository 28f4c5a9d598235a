// Ternary planes: what is coded comes back, takes the bits it should, and no bytes whatever make the
// decoder read or write where it must not (the sanitizers watch).
#include "ternary.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "tallcodec.h"

using namespace tallcodec;

namespace {

using Bits = std::vector<uint8_t>;

struct Plane {
  uint64_t n;
  Bits mask, signs;
};

void set(Bits& bits, uint64_t i) { bits[i / 8] = uint8_t(bits[i / 8] | 1 << i % 8); }

// n elements, a share of which is not 0.
Plane random_plane(std::mt19937_64& random, uint64_t n, double density) {
  Plane p{n, Bits((n + 7) / 8), Bits((n + 7) / 8)};
  for (uint64_t i = 0; i < n; ++i) {
    if (std::bernoulli_distribution(density)(random)) {
      set(p.mask, i);
      if (random() & 1) set(p.signs, i);
    }
  }
  return p;
}

std::string code(const Plane& p) {
  GapCounts counts{};
  const auto for_each_block = [&](auto visit) {
    for (uint64_t at = 0; at < p.n; at += kTernaryBlock) {
      visit(&p.mask[at / 8], &p.signs[at / 8], std::min(kTernaryBlock, p.n - at));
    }
  };
  for_each_block([&](const uint8_t* mask, const uint8_t*, uint64_t n) { TernaryCoder::count(mask, n, counts); });
  const TernaryCoder coder(counts);
  std::string ends, blocks;
  for_each_block([&](const uint8_t* mask, const uint8_t* signs, uint64_t n) {
    blocks += coder.code(mask, signs, n);
    append(ends, uint64_t{blocks.size()});
  });
  return ends + coder.table() + blocks;
}

// Decodes a copy of exactly the bytes' size, all blocks; false where it is not sound.
bool decode(const std::string& coded, uint64_t n, Plane& to) {
  to = {n, Bits((n + 7) / 8, 0xaa), Bits((n + 7) / 8, 0xaa)};
  std::unique_ptr<uint8_t[]> bytes(new uint8_t[coded.size()]);
  std::copy(coded.begin(), coded.end(), bytes.get());
  try {
    const TernaryPlane plane(bytes.get(), coded.size(), n);
    for (uint64_t b = plane.blocks().count(); b-- > 0;) {
      const auto [block, size] = plane.blocks().block(b);
      plane.decode(block, size, b, to.mask.data() + b * (kTernaryBlock / 8), to.signs.data() + b * (kTernaryBlock / 8));
    }
    return true;
  } catch (const Error& e) {
    CHECK(e.status == Status::Format);
    return false;
  }
}

void test_round_trip() {
  std::mt19937_64 random(1);
  for (uint64_t n : {1, 2, 7, 8, 9, 63, 64, 65, 1000, 262143, 262144, 262145, 600001}) {
    for (double density : {0.0, 0.001, 0.02, 0.3, 0.9, 1.0}) {
      const Plane p = random_plane(random, n, density);
      Plane back;
      CHECK(decode(code(p), n, back));
      check(back.mask == p.mask && back.signs == p.signs, "n=%d density=%g", int(n), density);
    }
  }
  for (uint64_t n : {1u, 5u, 262144u, 262145u, 800000u}) {  // one element, the longest gaps
    for (uint64_t at : {uint64_t{0}, n / 2, n - 1}) {
      Plane p{n, Bits((n + 7) / 8), Bits((n + 7) / 8)}, back;
      set(p.mask, at);
      set(p.signs, at);
      CHECK(decode(code(p), n, back) && back.mask == p.mask && back.signs == p.signs);
    }
  }
}

// Of independent elements a plane takes at most 3 % more than their entropy, its table and head included.
void test_bits() {
  std::mt19937_64 random(2);
  const uint64_t n = 4 * kTernaryBlock;
  for (double density : {.005, .01, .02, .05, .1, .2, .3, .4, .5}) {
    const Plane plane = random_plane(random, n, density);
    double set = 0;
    for (uint8_t byte : plane.mask) set += __builtin_popcount(byte);
    const double p = set / double(n);
    const double entropy = -p * std::log2(p) - (1 - p) * std::log2(1 - p) + p;
    const double bits = 8.0 * double(code(plane).size()) / double(n);
    check(bits < 1.03 * entropy, "p=%g takes %g bits of %g", p, bits, entropy);
  }
}

void test_damage() {
  std::mt19937_64 random(3);
  int refused = 0;
  for (int round = 0; round < 4000; ++round) {
    const uint64_t n = 1 + random() % 3000 + (round % 50 ? 0 : kTernaryBlock);
    std::string coded = code(random_plane(random, n, double(random() % 100) / 100));
    switch (random() % 3) {
      case 0: coded.resize(random() % (coded.size() + 1)); break;
      case 1: coded.insert(random() % coded.size(), 1 + random() % 9, char(random())); break;
      default:
        for (uint64_t k = 1 + random() % 4; k-- > 0;) {
          coded[random() % coded.size()] = char(random());
        }
    }
    Plane back;
    refused += !decode(coded, n, back);
  }
  CHECK(refused > 2000);  // signs are as good as any
}

}  // namespace

int main() {
  test_round_trip();
  test_bits();
  test_damage();
  std::printf("%d checks passed, %d failed\n", passed, failed);
  return failed != 0;
}
