// What the coders of planes share: a range coder of the ANS kind (arXiv 1311.2540), with states of 32
// bits and words of 16.
#pragma once
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#include "tallcodec.h"
#include "text.h"

namespace tallcodec {

// Puts a symbol on a state: its slots are `frequency` of 2^bits, from `start` on.
inline void push_symbol(uint32_t& state, uint32_t frequency, uint32_t start, uint32_t bits,
                        std::vector<uint16_t>& words) {
  if (state >= uint64_t{frequency} << (32 - bits)) {
    words.push_back(uint16_t(state));
    state >>= 16;
  }
  state = ((state / frequency) << bits) + state % frequency + start;
}

template <class T>
void append(std::string& to, T value) {
  to.append(reinterpret_cast<const char*>(&value), sizeof value);
}

template <class T>
T read(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

[[noreturn]] inline void unsound(const char* what) {
  throw Error(Status::Format, text("is not soundly coded: ", what));
}

inline void require(bool ok, const char* what) {
  if (!ok) unsound(what);
}

// The blocks of a coded plane. Its head begins with a 64-bit number for each, where it ends, counted from
// the end of the head. The bytes outlive this; where they changed since, the blocks do not lie in them.
class CodedBlocks {
 public:
  // `head` is at most `size`, and holds the numbers.
  CodedBlocks(const uint8_t* bytes, uint64_t size, uint64_t count, uint64_t head)
      : bytes_(bytes), size_(size), count_(count), head_(head) {
    for (uint64_t b = 0; b < count; ++b) {
      require(begin(b) <= end(b) && end(b) <= size, "its blocks lie outside it");
    }
    require(end(count - 1) == size, "bytes are left behind its blocks");
  }

  uint64_t count() const { return count_; }
  uint64_t head() const { return head_; }
  uint64_t begin(uint64_t block) const { return block ? end(block - 1) : head_; }
  uint64_t end(uint64_t block) const {
    const uint64_t offset = read<uint64_t>(bytes_ + 8 * block);
    return offset <= size_ - head_ ? head_ + offset : UINT64_MAX;
  }
  // A block's bytes and how many there are.
  std::pair<const uint8_t*, uint64_t> block(uint64_t block) const {
    const uint64_t from = begin(block), to = end(block);
    require(from <= to && to <= size_, "its blocks lie outside it");
    return {bytes_ + from, to - from};
  }

 private:
  const uint8_t* bytes_;
  uint64_t size_, count_, head_;
};

}  // namespace tallcodec
