// What a device takes of a file to decode there: bytes in memory, packed as they are stored, checked.
#include <algorithm>

#include "decode.h"
#include "parallel.h"

namespace tallcodec {
namespace {

// Bytes of a plane that are to be checked, and where they do not lie in memory as they are, read.
struct Piece {
  const PlaneBytes* plane;
  uint64_t begin, end;
  uint8_t* out;
};

uint64_t round_up(uint64_t x, uint64_t step) { return (x + step - 1) / step * step; }

}  // namespace

DevicePlan Decoder::device_plan(const std::vector<Job>& jobs, const std::set<uint32_t>& there) {
  DevicePlan plan;
  std::vector<Piece> pieces;
  const auto look_at = [&](const PlaneBytes& plane, uint64_t begin, uint64_t end, uint8_t* out) {
    for (uint64_t at = begin; at < end;) {
      const uint64_t stop = std::min((at / kCopyChunk + 1) * kCopyChunk, end);
      pieces.push_back({&plane, at, stop, out ? out + (at - begin) : nullptr});
      at = stop;
    }
  };
  const auto take = [&](const PlaneBytes& plane, uint64_t begin, uint64_t end) -> DevicePlane {
    if (!plane.record) return {};
    if (there.count(plane.id)) return {plane.id, nullptr, end - begin};
    if (plane.coding() == PlaneCoding::Zstd) {
      uint8_t* const out = plan.read.emplace_back(plane.record->raw_size).data();
      pieces.push_back({&plane, 0, plane.record->raw_size, out});
      return {plane.id, out + begin, end - begin};
    }
    if (plane.source.memory) {
      look_at(plane, begin, end, nullptr);
      return {plane.id, plane.source.memory + begin, end - begin};
    }
    uint8_t* const out = plan.read.emplace_back(end - begin).data();
    look_at(plane, begin, end, out);
    return {plane.id, out, end - begin};
  };
  const auto take_blocks = [&](const PlaneBytes& plane, const CodedBlocks& blocks, uint64_t first,
                               uint64_t end) -> DevicePlane {
    if (first == 0 && end == blocks.count()) return take(plane, 0, plane.record->size);
    try {
      const std::vector<uint8_t>& cut = plan.read.emplace_back(blocks.cut(first, end));
      look_at(plane, blocks.begin(first), blocks.end(end - 1), nullptr);
      return {plane.id, cut.data(), cut.size()};
    } catch (const Error& e) {  // the file has changed since it was opened
      unsound(plane, e);
    }
  };

  for (const Job& job : jobs) {
    DeviceTensor& t = plan.tensors.emplace_back();
    t.coding = job.coding;
    t.block = job.block;
    t.row_length = job.row_length;
    t.first = t.start = job.first;
    t.end = t.stop = job.end;
    if (t.first == t.end) continue;
    t.copied = take(job.copied, t.first * job.element_size, t.end * job.element_size);
    if (!job.computed()) continue;
    const CodedBlocks* const blocks = job.ternary             ? &job.ternary->blocks()
                                      : job.has_coded_masks() ? &*job.masks[0].coded
                                                              : nullptr;
    const uint64_t aligned = t.first / kScaleBlock * kScaleBlock;
    const uint64_t grain = !blocks ? kScaleBlock : job.ternary ? kTernaryBlock : kMaskBlock;
    t.start = t.first / grain * grain;
    if (blocks) t.stop = std::min(round_up(t.end, grain), job.elements);
    const uint64_t base_size = size_of(t.block.base_dtype), bits = t.start / 8, bits_end = (t.stop + 7) / 8;
    t.base = take(job.base, aligned * base_size, t.end * base_size);
    t.row_scales = take(job.row_scales, t.first / t.row_length * 4, ((t.end - 1) / t.row_length + 1) * 4);
    if (blocks) {
      const PlaneBytes& plane = job.ternary ? job.coded : job.masks[0].plane;
      const uint64_t first = t.start / grain, end = round_up(t.stop, grain) / grain;
      t.coded = take_blocks(plane, *blocks, first, end);
      t.head = blocks->head() - 8 * (blocks->count() - (end - first));
      t.ternary = job.ternary;
    }
    if (job.coding == Coding::Mask) {
      const uint64_t size = size_of(t.block.shared_dtype);
      t.shared = take(job.shared, t.start * size, t.stop * size);
      const uint64_t scales = t.start / kScaleBlock, scales_end = round_up(t.stop, kScaleBlock) / kScaleBlock;
      t.shared_scales = take(job.shared_scales, scales * 4, scales_end * 4);
      if (!blocks) t.mask = take(job.masks[0].plane, bits, bits_end);
    } else if (!blocks) {
      const uint64_t signs = job.coded.record->raw_size / 2;
      t.mask = take(job.coded, bits, bits_end);
      t.signs = take(job.coded, signs + bits, signs + bits_end);
    }
  }

  parallel_for(pieces.size(), options_.threads, watch(options_, "reading"), [&](uint64_t i, unsigned worker) {
    const auto& [plane, begin, end, out] = pieces[i];
    if (plane->coding() == PlaneCoding::Zstd) {
      inflate(*plane, out);
    } else if (out) {
      copy(*plane, begin, end, out, buffers_[worker].base);
    } else {
      check(*plane, plane->source.memory + begin, begin, end - begin);
    }
  });
  return plan;
}

}  // namespace tallcodec
