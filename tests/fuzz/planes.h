// Coded planes as the fuzz targets have them: decoded by all that can, made of choices, found in files.
#pragma once
#include <string>

#include "conditional.h"
#include "fuzz.h"
#include "gpu.h"
#include "kernels.h"
#include "tallcodec.h"
#include "ternary.h"

namespace tallcodec {

struct TernaryBits {
  bool sound;
  std::vector<uint8_t> mask, signs;

  bool operator==(const TernaryBits& o) const {
    return sound == o.sound && (!sound || (mask == o.mask && signs == o.signs));
  }
};

// What kinds of inputs there are: an input's first byte.
enum class Kind : uint8_t { TernaryBytes, TernaryParts, TernaryPlane, MaskBytes, MaskParts, MaskPlane, File, Count };

inline std::string code_ternary(const std::vector<uint8_t>& mask, const std::vector<uint8_t>& signs, uint64_t n) {
  GapCounts counts{};
  const auto for_each_block = [&](auto visit) {
    for (uint64_t at = 0; at < n; at += kTernaryBlock) visit(at / 8, std::min(kTernaryBlock, n - at));
  };
  for_each_block([&](uint64_t byte, uint64_t size) { TernaryCoder::count(&mask[byte], size, counts); });
  const TernaryCoder coder(counts);
  std::string ends, blocks;
  for_each_block([&](uint64_t byte, uint64_t size) {
    blocks += coder.code(&mask[byte], &signs[byte], size);
    append(ends, uint64_t{blocks.size()});
  });
  return ends + coder.table() + blocks;
}

}  // namespace tallcodec
