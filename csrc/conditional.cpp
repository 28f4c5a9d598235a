#include "conditional.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "float_environment.h"
#include "kernels.h"
#include "mask_math.h"
#include "rans.h"

namespace tallcodec {
namespace {

constexpr uint32_t kSlots = 1 << kMaskBits;
constexpr uint64_t kHead = 12;

// The contexts of elements first .. first + n, n at most kMaskGroup, of one scale's block. Not inlined:
// float_environment.h.
__attribute__((noinline)) void contexts(const SharedBlock& s, uint64_t first, uint64_t n, uint16_t* to) {
  const auto at = static_cast<const uint8_t*>(s.values) + first * size_of(s.dtype);
  switch (s.dtype) {
    case DType::F32:
      for (uint64_t i = 0; i < n; ++i) to[i] = uint16_t(mask_context(read<float>(at + 4 * i)));
      break;
    case DType::F16:
      for (uint64_t i = 0; i < n; ++i) to[i] = uint16_t(mask_context(f16_to_f32(read<uint16_t>(at + 2 * i))));
      break;
    case DType::BF16:
      for (uint64_t i = 0; i < n; ++i) to[i] = uint16_t(mask_context(bf16_to_f32(read<uint16_t>(at + 2 * i))));
      break;
    default:
      const float scale = s.scales[first / kScaleBlock];
      for (uint64_t i = 0; i < n; ++i) to[i] = uint16_t(mask_context(dequantise(int8_t(at[i]), scale)));
  }
}

uint64_t group_of(const uint8_t* mask, uint64_t first, uint64_t n) {
  uint64_t bits = 0;
  std::memcpy(&bits, mask + first / 8, (n + 7) / 8);
  return bits;
}

struct Count {
  uint32_t ones = 0, all = 0;

  void add(bool bit) {
    ones += bit;
    ++all;
  }
  // Of a one, in slots: not 0 and not all of them where there is any one, any zero.
  uint16_t frequency() const {
    if (!ones) return 0;
    if (ones == all) return kSlots;
    const uint64_t rounded = (uint64_t{ones} * kSlots + all / 2) / all;
    return uint16_t(std::clamp<uint64_t>(rounded, 1, kSlots - 1));
  }
};

}  // namespace

std::string code_mask(const uint8_t* mask, const SharedBlock& s, uint64_t n) {
  FloatEnvironment environment;
  std::array<Count, kMaskContexts + 1> counts;
  Count flags[2];  // after a group without and with a bit
  uint16_t c[kMaskGroup];
  bool before = true, any = false;
  for (uint64_t first = 0; first < n; first += kMaskGroup) {
    const uint64_t size = std::min<uint64_t>(kMaskGroup, n - first), bits = group_of(mask, first, size);
    flags[before].add(bits != 0);
    before = bits != 0;
    any |= before;
    if (!before) continue;
    contexts(s, first, size, c);
    for (uint64_t i = 0; i < size; ++i) counts[c[i]].add(bits >> i & 1);
  }
  if (!any) return {};

  uint32_t first_context = 1, end_context = kMaskContexts;
  while (!counts[first_context].all) ++first_context;
  while (!counts[end_context - 1].all) --end_context;
  std::array<uint16_t, kMaskContexts + 1> frequency{};
  for (uint32_t k = first_context; k < end_context; ++k) frequency[k] = counts[k].frequency();
  const uint16_t flag_frequency[2] = {flags[0].frequency(), flags[1].frequency()};

  std::vector<uint16_t> words;
  uint32_t state[kMaskStates];
  std::fill(state, state + kMaskStates, kLeast);
  const auto push = [&](uint32_t& x, uint32_t f, bool one) {
    push_symbol(x, one ? f : kSlots - f, one ? 0 : f, kMaskBits, words);
  };
  for (uint64_t groups = (n + kMaskGroup - 1) / kMaskGroup; groups-- > 0;) {
    const uint64_t first = groups * kMaskGroup, size = std::min<uint64_t>(kMaskGroup, n - first);
    const uint64_t bits = group_of(mask, first, size);
    if (bits) {
      contexts(s, first, size, c);
      for (uint64_t i = size; i-- > 0;) push(state[i % kMaskStates], frequency[c[i]], bits >> i & 1);
    }
    const bool after = !first || group_of(mask, first - kMaskGroup, kMaskGroup) != 0;
    push(state[0], flag_frequency[after], bits != 0);
  }
  std::reverse(words.begin(), words.end());

  std::string block;
  append(block, uint32_t(words.size()));
  append(block, uint16_t(first_context));
  append(block, uint16_t(end_context - first_context));
  block.append(reinterpret_cast<const char*>(flag_frequency), sizeof flag_frequency);
  block.append(reinterpret_cast<const char*>(&frequency[first_context]),
               2 * (end_context - first_context));
  block.append(reinterpret_cast<const char*>(state), sizeof state);
  block.append(reinterpret_cast<const char*>(words.data()), 2 * words.size());
  return block;
}

void decode_mask(const uint8_t* bytes, uint64_t size, const SharedBlock& s, uint64_t n,
                 const Kernels& kernels, uint8_t* mask) {
  FloatEnvironment environment;
  std::memset(mask, 0, (n + 7) / 8);
  if (!size) return;
  require(size >= kHead, "a block is too short");
  const uint64_t words = read<uint32_t>(bytes);
  const uint32_t first_context = read<uint16_t>(bytes + 4), used = read<uint16_t>(bytes + 6);
  const uint32_t flag_frequency[2] = {read<uint16_t>(bytes + 8), read<uint16_t>(bytes + 10)};
  require(first_context && first_context + used <= kMaskContexts, "a block's contexts are impossible");
  require(size == kHead + 2 * used + 4 * kMaskStates + 2 * words, "a block's counts are impossible");
  require(std::max(flag_frequency[0], flag_frequency[1]) <= kSlots, "a frequency is too large");
  uint16_t frequency[kMaskContexts + 2] = {};
  std::memcpy(frequency + first_context, bytes + kHead, 2 * used);
  for (uint32_t f : frequency) require(f <= kSlots, "a frequency is too large");
  uint32_t state[kMaskStates];
  std::memcpy(state, bytes + kHead + 2 * used, sizeof state);
  for (uint32_t x : state) require(x >= kLeast, "a block's states are impossible");

  const uint8_t* const end = bytes + size;
  const uint8_t* word = end - 2 * words;
  uint32_t flag = 1;
  for (uint64_t first = 0; first < n; first += kMaskGroup) {
    const uint64_t count = std::min<uint64_t>(kMaskGroup, n - first);
    uint8_t last[2 * (1 + kMaskGroup + 16)];  // the last words, with room to read on behind them
    const uint8_t* const here = word;
    const bool near = end - word < ptrdiff_t(sizeof last);
    if (near) {
      std::memset(last, 0, sizeof last);
      std::memcpy(last, word, size_t(end - word));
      word = last;
    }
    word += 2 * take_bit(state[0], flag_frequency[flag], kMaskBits, read<uint16_t>(word), flag);
    if (flag) {
      const uint64_t element = size_of(s.dtype);
      const uint8_t* shared = static_cast<const uint8_t*>(s.values) + first * element;
      uint8_t padded[kMaskGroup * 4] = {};  // where s is 0 nothing is taken off a state
      if (count < kMaskGroup) shared = static_cast<uint8_t*>(std::memcpy(padded, shared, count * element));
      const float scale = s.dtype == DType::I8 ? s.scales[first / kScaleBlock] : 0;
      MaskGroup group{shared, s.dtype, scale, frequency, state, word};
      const uint64_t bits = kernels.unmask(group);
      word = group.word;
      std::memcpy(mask + first / 8, &bits, (count + 7) / 8);
    }
    if (near) {
      const ptrdiff_t taken = word - last;
      require(taken <= end - here, "a block's words run out");
      word = here + taken;
    }
  }
  require(word == end, "a block has words left");
  for (uint32_t x : state) require(x == kLeast, "a block does not end where its bits do");
}

}  // namespace tallcodec
