// Ternary planes: which elements of a tensor are 1 or -1, the gaps between them entropy coded, in blocks
// that decode alone. docs/format.md, "Ternary planes".
#pragma once
#include <array>
#include <cstdint>
#include <string>

#include "kernels.h"
#include "rans.h"

namespace tallcodec {

constexpr uint32_t kGapSymbols = 68;
using GapCounts = std::array<uint64_t, kGapSymbols>;  // of a plane, by symbol

// Codes a plane, block by block: bits as a mask has them, of the elements that are not 0 and, among these, of
// those that are -1. Spare bits are 0.
class TernaryCoder {
 public:
  // Adds the gaps of one block of n elements.
  static void count(const uint8_t* mask, uint64_t n, GapCounts& counts);

  // `counts` are those of all blocks.
  explicit TernaryCoder(const GapCounts& counts);

  std::string table() const;  // what the plane has between its blocks' ends and its blocks
  std::string code(const uint8_t* mask, const uint8_t* signs, uint64_t n) const;

 private:
  std::array<uint32_t, kGapSymbols> frequency_{}, start_{};
};

// A coded plane of n elements. Believes nothing: what is not sound is an Error(Status::Format).
class TernaryPlane {
 public:
  TernaryPlane(const uint8_t* bytes, uint64_t size, uint64_t n);

  const CodedBlocks& blocks() const { return blocks_; }
  // The bits of the elements from block * kTernaryBlock on, in (elements + 7) / 8 bytes each, of the block's
  // bytes.
  void decode(const uint8_t* bytes, uint64_t size, uint64_t block, uint8_t* mask, uint8_t* signs) const;

 private:
  struct Slot {
    uint16_t frequency, bias;  // bias: the slot's place among those of its symbol
    uint32_t gap : 27, extra : 5;  // the smallest gap of the symbol, and how many bits are added to it
  };

  uint64_t n_;
  CodedBlocks blocks_;
  Slot slots_[1 << kTernarySlotBits];
};

}  // namespace tallcodec
