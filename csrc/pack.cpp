#include "pack.h"

#include <map>
#include <mutex>
#include <numeric>

#include "conditional.h"
#include "parallel.h"
#include "rans.h"

namespace tallcodec {
namespace {

// Blocks are coded in any order and taken in order: they wait behind the planes, in the file, until all of
// theirs are there. Nothing is written over what is still to be read: that of later planes.
class Packer {
 public:
  Packer(Draft& d, uint64_t begin, std::vector<Move> moves, Journal* journal)
      : d_(d), moves_(std::move(moves)), journal_(journal), begin_(begin), end_(begin) {
    for (Move& move : moves_) {  // what is coded already
      const bool done = is(Journal::Step::Waiting, move.plane) || is(Journal::Step::Placed, move.plane);
      if (done) move.blocks = 0;
    }
  }

  void run(const Options& options, const char* step) {
    std::vector<std::pair<const Move*, uint64_t>> items;
    for (const Move& move : moves_) {
      for (uint64_t b = 0; b < move.blocks; ++b) items.emplace_back(&move, b);
    }
    std::mutex mutex;
    std::map<uint64_t, std::string> waiting;
    uint64_t next = 0;
    parallel_for(items.size(), options.threads, watch(options, step), [&](uint64_t i, unsigned) {
      const auto& [move, number] = items[i];
      std::string block = move->code(number);
      std::lock_guard lock(mutex);
      waiting.emplace(i, std::move(block));
      for (auto it = waiting.begin(); it != waiting.end() && it->first == next; ++next) {
        take(it->second);
        it = waiting.erase(it);
      }
    });
    while (move_ < moves_.size()) place();
    d_.truncate(begin_, end_);
  }

 private:
  Move& current() { return moves_[move_]; }

  // The next block in order.
  void take(const std::string& block) {
    while (!current().blocks) place();
    const uint64_t head = 8 * current().blocks + current().table.size();
    d_.write(block.data(), block.size(), d_.end + head + size_);
    size_ += block.size();
    append(ends_, size_);
    if (ends_.size() < 8 * current().blocks) return;
    ends_ += current().table;
    d_.write(ends_.data(), head, d_.end);
    d_.clear(d_.end + head + size_, align64(head + size_) - head - size_);  // where another may have waited
    place(head + size_);
    ends_.clear();
    size_ = 0;
  }

  // Moves the next plane, whose coded form, of so many bytes, waits behind all planes.
  void place(uint64_t coded = UINT64_MAX) {
    const uint32_t id = current().plane;
    DraftPlane& plane = d_.planes[id];
    ++move_;
    if (!is(Journal::Step::Placed, id)) {
      if (coded < plane.record.raw_size) {
        plane.record.coding = moves_[move_ - 1].coding;
        plane.record.size = coded;
        plane.record.offset = d_.end;
        plane.sums.assign(sum_count(coded), 0);
      } else if (plane.record.offset != end_ && plane.record.offset != d_.end) {
        d_.copy(plane.record.offset, d_.end, plane.record.size);
        plane.record.offset = d_.end;
      }
      d_.sum(id);
      if (plane.record.offset == d_.end) {
        note(Journal::Step::Waiting, id);
        d_.copy(d_.end, end_, plane.record.size);
        plane.record.offset = end_;
      }
      note(Journal::Step::Placed, id);
    }
    end_ = plane.record.offset + align64(plane.record.size);
  }

  bool is(Journal::Step step, uint32_t plane) const { return journal_ && journal_->has(step, plane); }
  void note(Journal::Step step, uint32_t plane) {
    if (journal_) journal_->add(step, plane, d_, {{plane}, {}, {}, {}});
  }

  Draft& d_;
  std::vector<Move> moves_;
  Journal* const journal_;
  size_t move_ = 0;            // the next to be placed
  std::string ends_;           // of its blocks so far
  uint64_t size_ = 0;          // and how many bytes they have
  const uint64_t begin_;
  uint64_t end_;               // of those that are placed
};

std::string code_block(const Draft& d, const DraftTensor& t, uint32_t plane, uint64_t block) {
  const uint64_t first = block * kMaskBlock, n = std::min(kMaskBlock, t.elements() - first);
  const uint64_t size = size_of(t.shared_dtype);
  std::vector<uint8_t> mask, shared, scales;
  SharedBlock s{d.source(t.record.shared_plane).view(first * size, n * size, shared), t.shared_dtype, nullptr};
  if (t.record.shared_scales_plane != kNone) {
    s.scales = reinterpret_cast<const float*>(
        d.source(t.record.shared_scales_plane)
            .view(first / kScaleBlock * 4, (n + kScaleBlock - 1) / kScaleBlock * 4, scales));
  }
  return code_mask(d.source(plane).view(first / 8, (n + 7) / 8, mask), s, n);
}

}  // namespace

void pack(Draft& draft, uint64_t begin, std::vector<Move> moves, const Options& options, const char* step,
          Journal* journal) {
  Packer(draft, begin, std::move(moves), journal).run(options, step);
}

void pack_masks(Draft& draft, const Options& options) {
  if (draft.journal.has(Journal::Step::Packed)) return;
  std::vector<Move> moves;
  for (uint32_t k = 0; k < draft.tasks.size(); ++k) {
    for (const DraftTensor& t : draft.tensors) {
      const EntryRecord& e = t.entries[k].record;
      if (t.record.alias != kNone || e.coding != Coding::Mask) continue;
      const uint64_t blocks = (t.elements() + kMaskBlock - 1) / kMaskBlock;
      moves.push_back({e.plane, PlaneCoding::Conditional, blocks, {}, [&, plane = e.plane](uint64_t block) {
        return code_block(draft, t, plane, block);
      }});
      if (e.scales_plane != kNone) moves.push_back({e.scales_plane, PlaneCoding::Raw, 0, {}, {}});
    }
  }
  pack(draft, draft.masks, std::move(moves), options, "coding masks", &draft.journal);
  Journal::Changes all;
  all.planes.resize(draft.planes.size());
  std::iota(all.planes.begin(), all.planes.end(), 0);
  draft.journal.add(Journal::Step::Packed, 0, draft, all);
}

}  // namespace tallcodec
