#include "pack.h"

#include <mutex>

#include "conditional.h"
#include "parallel.h"
#include "rans.h"

namespace tallcodec {
namespace {

// A plane on its way up: a mask, or the scales that lie between two.
struct Move {
  uint32_t plane;
  const DraftTensor* tensor;  // of a mask
  std::vector<std::string> blocks;
  uint64_t coded = 0;  // how many of them are
};

class Packer {
 public:
  explicit Packer(Draft& d) : d_(d), end_(d.masks) {
    for (uint32_t k = 0; k < d.tasks.size(); ++k) {
      for (const DraftTensor& t : d.tensors) {
        const EntryRecord& e = t.entries[k].record;
        if (t.record.alias != kNone || e.coding != Coding::Mask) continue;
        moves_.push_back({e.plane, &t, {}});
        moves_.back().blocks.resize((t.elements() + kMaskBlock - 1) / kMaskBlock);
        if (e.scales_plane != kNone) moves_.push_back({e.scales_plane, nullptr, {}});
      }
    }
  }

  void run(const Options& options) {
    struct Item {
      size_t move;
      uint64_t block;
    };
    std::vector<Item> items;
    for (size_t m = 0; m < moves_.size(); ++m) {
      for (uint64_t b = 0; b < moves_[m].blocks.size(); ++b) items.push_back({m, b});
    }
    std::mutex mutex;
    parallel_for(items.size(), options.threads, watch(options, "coding masks"), [&](uint64_t i, unsigned) {
      Move& move = moves_[items[i].move];
      std::string block = code(move, items[i].block);
      std::lock_guard lock(mutex);
      move.blocks[items[i].block] = std::move(block);
      ++move.coded;
      // Nothing is written before all that lies there has been read: that of this plane or an earlier one.
      while (next_ < moves_.size() && moves_[next_].coded == moves_[next_].blocks.size()) {
        put(moves_[next_++]);
      }
    });
    d_.truncate(end_);
  }

 private:
  Source at(const DraftPlane& plane) const { return {nullptr, d_.fd, plane.record.offset}; }

  std::string code(const Move& move, uint64_t block) const {
    const DraftTensor& t = *move.tensor;
    const uint64_t first = block * kMaskBlock, n = std::min(kMaskBlock, t.elements() - first);
    const uint64_t size = size_of(t.shared_dtype);
    std::vector<uint8_t> mask, shared, scales;
    SharedBlock s{at(d_.planes[t.record.shared_plane]).view(first * size, n * size, shared),
                  t.shared_dtype, nullptr};
    if (t.record.shared_scales_plane != kNone) {
      s.scales = reinterpret_cast<const float*>(
          at(d_.planes[t.record.shared_scales_plane])
              .view(first / kScaleBlock * 4, (n + kScaleBlock - 1) / kScaleBlock * 4, scales));
    }
    return code_mask(at(d_.planes[move.plane]).view(first / 8, (n + 7) / 8, mask), s, n);
  }

  void put(Move& move) {
    DraftPlane& plane = d_.planes[move.plane];
    std::string coded = join_blocks(move.blocks);
    move.blocks.clear();
    std::vector<uint8_t> raw;
    if (move.tensor && coded.size() < plane.record.raw_size) {
      plane.record.coding = PlaneCoding::Conditional;
      plane.record.size = coded.size();
      plane.sums.assign(sum_count(coded.size()), 0);
    } else {
      const uint8_t* const bytes = at(plane).view(0, plane.record.size, raw);
      coded.assign(reinterpret_cast<const char*>(bytes), plane.record.size);
    }
    coded.resize(align64(coded.size()), '\0');  // over what was there
    plane.record.offset = end_;
    end_ += coded.size();
    d_.put(move.plane, 0, coded.data(), coded.size());
  }

  Draft& d_;
  std::vector<Move> moves_;
  size_t next_ = 0;
  uint64_t end_;
};

}  // namespace

void pack_masks(Draft& draft, const Options& options) { Packer(draft).run(options); }

}  // namespace tallcodec
