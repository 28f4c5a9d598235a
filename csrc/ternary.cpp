#include "ternary.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

namespace tallcodec {
namespace {

constexpr uint32_t kSlotBits = kTernarySlotBits, kSlots = 1 << kSlotBits;
constexpr uint32_t kBitmapBytes = (kGapSymbols + 7) / 8;
constexpr uint64_t kBlockHead = 16;   // bytes: count, words, two states

// Gaps are coded by the three leading bits of gap + 4; the bits behind them follow as they are.
struct Split {
  uint32_t symbol, extra;  // extra: how many bits
};

Split split(uint32_t gap) {
  const uint32_t v = gap + 4, extra = 29 - uint32_t(__builtin_clz(v));
  return {extra * 4 + (v >> extra & 3), extra};
}

uint32_t smallest_gap(uint32_t symbol) { return ((4 + symbol % 4) << symbol / 4) - 4; }

// Bits, the first in the least significant bit of the first byte.
class BitWriter {
 public:
  void put(uint64_t value, uint32_t count) {
    held_ |= value << filled_;
    for (filled_ += count; filled_ >= 8; filled_ -= 8, held_ >>= 8) bytes_.push_back(char(held_));
  }
  const std::string& finish() {
    if (filled_) bytes_.push_back(char(held_));
    filled_ = 0;
    return bytes_;
  }

 private:
  std::string bytes_;
  uint64_t held_ = 0;
  uint32_t filled_ = 0;
};

// Runs visit(gap, negative) on the elements of a block that are not 0: how many zeros are before each.
template <class Visit>
void for_each_gap(const uint8_t* mask, const uint8_t* signs, uint64_t n, Visit visit) {
  uint64_t next = 0;
  for (uint64_t first = 0; first < n; first += 64) {
    uint64_t bits = 0, negative = 0;
    const uint64_t bytes = (std::min<uint64_t>(64, n - first) + 7) / 8;
    std::memcpy(&bits, mask + first / 8, bytes);
    std::memcpy(&negative, signs + first / 8, bytes);
    for (; bits; bits &= bits - 1) {
      const uint64_t bit = uint64_t(__builtin_ctzll(bits));
      visit(uint32_t(first + bit - next), negative >> bit & 1);
      next = first + bit + 1;
    }
  }
}

// The blocks of a plane of n elements, whose head ends where its table does.
CodedBlocks blocks_of(const uint8_t* bytes, uint64_t size, uint64_t n) {
  const uint64_t blocks = (n + kTernaryBlock - 1) / kTernaryBlock, table = 8 * blocks;
  require(size >= table && size - table >= kBitmapBytes, "it is too short");
  uint32_t symbols = 0;
  for (uint32_t i = 0; i < kBitmapBytes; ++i) symbols += uint32_t(__builtin_popcount(bytes[table + i]));
  const uint64_t head = table + kBitmapBytes + (uint64_t{symbols} * kSlotBits + 7) / 8;
  require(size >= head, "it is too short for its table");
  require(symbols || size == head, "it has blocks but no symbols");
  return {bytes, size, blocks, head};
}

}  // namespace

void TernaryCoder::count(const uint8_t* mask, uint64_t n, GapCounts& counts) {
  for_each_gap(mask, mask, n, [&](uint32_t gap, uint64_t) { ++counts[split(gap).symbol]; });
}

// Frequencies are the counts scaled to add up to kSlots: rounded, but not to 0; the commonest symbol takes
// the rest.
TernaryCoder::TernaryCoder(const GapCounts& counts) {
  const uint64_t total = std::accumulate(counts.begin(), counts.end(), uint64_t{0});
  if (!total) return;
  uint32_t sum = 0;
  for (uint32_t s = 0; s < kGapSymbols; ++s) {
    if (!counts[s]) continue;
    frequency_[s] = uint32_t(std::max<uint64_t>(1, (counts[s] * kSlots + total / 2) / total));
    sum += frequency_[s];
  }
  *std::max_element(frequency_.begin(), frequency_.end()) += kSlots - sum;
  for (uint32_t s = 1; s < kGapSymbols; ++s) start_[s] = start_[s - 1] + frequency_[s - 1];
}

std::string TernaryCoder::table() const {
  std::string bytes(kBitmapBytes, '\0');
  BitWriter values;
  for (uint32_t s = 0; s < kGapSymbols; ++s) {
    if (!frequency_[s]) continue;
    bytes[s / 8] = char(bytes[s / 8] | 1 << s % 8);
    values.put(frequency_[s] - 1, kSlotBits);
  }
  return bytes + values.finish();
}

// Two states take turns.
std::string TernaryCoder::code(const uint8_t* mask, const uint8_t* signs, uint64_t n) const {
  std::vector<uint32_t> gaps;
  BitWriter extras, negatives;
  for_each_gap(mask, signs, n, [&](uint32_t gap, uint64_t negative) {
    gaps.push_back(gap);
    const uint32_t extra = split(gap).extra;
    extras.put((gap + 4) & ((1u << extra) - 1), extra);
    negatives.put(negative, 1);
  });
  const uint64_t count = gaps.size();
  if (!count) return {};
  std::vector<uint16_t> words;
  uint32_t state[2] = {kLeast, kLeast};
  for (uint64_t i = count; i-- > 0;) {
    const uint32_t symbol = split(gaps[i]).symbol;
    push_symbol(state[i % 2], frequency_[symbol], start_[symbol], kSlotBits, words);
  }
  std::reverse(words.begin(), words.end());
  std::string block;
  append(block, uint32_t(count));
  append(block, uint32_t(words.size()));
  append(block, state[0]);
  append(block, state[1]);
  block.append(reinterpret_cast<const char*>(words.data()), words.size() * 2);
  return block + extras.finish() + negatives.finish();
}

TernaryPlane::TernaryPlane(const uint8_t* bytes, uint64_t size, uint64_t n)
    : n_(n), blocks_(blocks_of(bytes, size, n)) {
  const uint64_t table = 8 * blocks_.count();
  uint32_t slot = 0;
  uint64_t bit = 0;
  for (uint32_t s = 0; s < kBitmapBytes * 8; ++s) {
    if (!(bytes[table + s / 8] >> s % 8 & 1)) continue;
    require(s < kGapSymbols, "its table has symbols that no gap has");
    uint32_t frequency = 1;
    for (uint32_t b = 0; b < kSlotBits; ++b, ++bit) {
      frequency += uint32_t(bytes[table + kBitmapBytes + bit / 8] >> bit % 8 & 1) << b;
    }
    require(frequency <= kSlots - slot, "its frequencies add up to too much");
    for (uint32_t i = 0; i < frequency; ++i, ++slot) {
      slots_[slot] = {uint16_t(frequency), uint16_t(i), smallest_gap(s), s / 4};
    }
  }
  require(slot == kSlots || !slot, "its frequencies do not add up");
}

void TernaryPlane::decode(const uint8_t* bytes, uint64_t size, uint64_t block, uint8_t* mask,
                          uint8_t* signs) const {
  const uint64_t n = std::min(kTernaryBlock, n_ - block * kTernaryBlock);
  std::memset(mask, 0, (n + 7) / 8);
  std::memset(signs, 0, (n + 7) / 8);
  if (!size) return;
  require(size >= kBlockHead, "a block is too short");
  const uint32_t count = read<uint32_t>(bytes), word_count = read<uint32_t>(bytes + 4);
  const uint64_t sign_bytes = (uint64_t{count} + 7) / 8;
  require(count > 0 && count <= n && size - kBlockHead >= 2 * uint64_t{word_count} + sign_bytes,
          "a block's counts are impossible");
  const uint8_t* word = bytes + kBlockHead;
  const uint8_t* const words_end = word + 2 * uint64_t{word_count};
  const uint8_t* const extras = words_end;
  const uint8_t* const negative = bytes + size - sign_bytes;
  const uint64_t extra_bits = uint64_t(negative - extras) * 8;
  uint32_t state[2] = {read<uint32_t>(bytes + 8), read<uint32_t>(bytes + 12)};
  require(state[0] >= kLeast && state[1] >= kLeast, "a block's states are impossible");

  uint64_t bit = 0, next = 0;  // of the extras; the element behind the last one found
  const auto set = [&](uint64_t i, uint32_t sign) {
    mask[i / 8] = uint8_t(mask[i / 8] | 1 << i % 8);
    signs[i / 8] = uint8_t(signs[i / 8] | (sign & 1) << i % 8);
  };
  // Takes a symbol off a state, which is then to be filled again.
  const auto take = [&](uint32_t& x) {
    const Slot slot = slots_[x & (kSlots - 1)];
    x = slot.frequency * (x >> kSlotBits) + slot.bias;
    return slot;
  };

  uint64_t i = 0;
  // Two symbols at a time, without a branch, for as long as two words and eight bytes of extras can be
  // read unasked.
  const uint64_t behind = uint64_t(bytes + size - extras);
  const uint64_t last_bit = behind < 8 ? 0 : (behind - 8) * 8;
  for (; i + 2 <= count && words_end - word >= 4 && bit < last_bit; i += 2) {
    uint64_t held;
    std::memcpy(&held, extras + bit / 8, sizeof held);
    held >>= bit % 8;
    const uint32_t filling = read<uint32_t>(word);  // for either state, or one, or none
    const Slot first = take(state[0]), second = take(state[1]);
    const uint32_t low = state[0] < kLeast, also = state[1] < kLeast;
    state[0] = state[0] << 16 * low | (filling & (0xffff & -low));
    state[1] = state[1] << 16 * also | (filling >> 16 * low & (0xffff & -also));
    word += 2 * (low + also);
    const uint64_t one = next + first.gap + (held & ((1u << first.extra) - 1));
    const uint64_t two = one + 1 + second.gap + (held >> first.extra & ((1u << second.extra) - 1));
    if (two >= n) unsound("a gap leads beyond its block");
    const uint32_t sign = negative[i / 8] >> i % 8;
    set(one, sign);
    set(two, sign >> 1);
    next = two + 1;
    bit += first.extra + second.extra;
  }
  require(bit <= extra_bits, "a block's bits run out");
  for (; i < count; ++i) {
    uint32_t& x = state[i % 2];
    const Slot slot = take(x);
    if (x < kLeast) {
      require(words_end - word >= 2, "a block's words run out");
      uint16_t filling;
      std::memcpy(&filling, word, sizeof filling);
      x = x << 16 | filling;
      word += 2;
    }
    require(extra_bits - bit >= slot.extra, "a block's bits run out");
    uint32_t extra = 0;
    for (uint32_t b = 0; b < slot.extra; ++b, ++bit) {
      extra |= uint32_t(extras[bit / 8] >> bit % 8 & 1) << b;
    }
    next += slot.gap + extra;
    require(next < n, "a gap leads beyond its block");
    set(next++, negative[i / 8] >> i % 8);
  }
  require(state[0] == kLeast && state[1] == kLeast && word == words_end && extra_bits - bit < 8,
          "a block does not end where its symbols do");
}

}  // namespace tallcodec
