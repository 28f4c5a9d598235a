// Planes and kernels to tensors: the work behind an open File.
#pragma once
#include <algorithm>
#include <list>
#include <memory>
#include <optional>
#include <set>
#include <vector>

#include "conditional.h"
#include "format.h"
#include "kernels.h"
#include "ternary.h"

namespace tallcodec {

// The planes that decoding a tensor reads.
std::vector<uint32_t> planes_of(const Index& index, uint32_t task, uint32_t tensor);

// Throws Error(Status::Version) for a plane of a newer writer.
void require_known_plane(const File& file, uint32_t id);

// A plane's bytes and checksums. Those of an external one are the caller's, and end without padding; those of
// a loaded one are in memory, raw, and right.
struct PlaneBytes {
  const PlaneRecord* record = nullptr;
  uint32_t id = kNone;
  Source source;
  bool loaded = false;

  PlaneCoding coding() const { return loaded ? PlaneCoding::Raw : record->coding; }
  uint64_t size() const {
    return record->coding == PlaneCoding::External ? record->raw_size : align64(record->size);
  }
};

// A mask, raw or in blocks coded given the shared vector.
struct MaskPlane {
  PlaneBytes plane;
  std::optional<CodedBlocks> coded;
};

// One tensor on its way out, or a part of one.
struct Job {
  const Request* request = nullptr;
  Coding coding = Coding::Base;  // as the base, mask, verbatim or ternary
  PlaneBytes copied;             // as the base, verbatim: what the tensor is
  PlaneBytes base, shared, shared_scales, row_scales;
  std::vector<MaskPlane> masks;  // one, or those of a consensus
  PlaneBytes coded;              // ternary: the plane, and where it is coded what is made of it
  std::shared_ptr<const TernaryPlane> ternary;
  uint32_t min_tasks = 1;  // as in Merging; a task's own mask is the consensus of one
  DecodeBlock block{};     // the types and the scale
  uint64_t elements = 0, row_length = 0;
  uint64_t first = 0, end = 0;  // the elements that are wanted
  uint32_t element_size = 1;    // of what is decoded

  bool computed() const { return coding == Coding::Mask || coding == Coding::Ternary; }
  // Elements that are worked on at once.
  uint64_t part_size() const {
    if (computed()) return kUnit;
    const bool one = copied.record && copied.coding() == PlaneCoding::Zstd;
    return one ? elements : kCopyChunk / element_size;
  }
  uint64_t first_part() const { return first / part_size(); }
  uint64_t end_part() const { return first < end ? (end - 1) / part_size() + 1 : first_part(); }
  uint64_t units() const { return (elements + kUnit - 1) / kUnit; }
  bool has_coded_masks() const {
    return std::any_of(masks.begin(), masks.end(), [](const MaskPlane& m) { return m.coded.has_value(); });
  }
};

// Bytes of a plane as a device takes them: checked, in memory.
struct DevicePlane {
  uint32_t id = kNone;             // none: there is nothing to take
  const uint8_t* bytes = nullptr;  // null: the device has the plane
  uint64_t size = 0;
};

// What a device takes to decode the elements first .. end of a tensor.
struct DeviceTensor {
  Coding coding;
  DecodeBlock block;  // the types and the scale
  uint64_t row_length, first, end;
  DevicePlane copied;      // as the base, verbatim: the bytes that are wanted
  DevicePlane base;        // from the last multiple of kScaleBlock before `first` on, to `end`
  DevicePlane row_scales;  // of the rows that are touched
  // Of elements start .. stop: where a mask or ternary plane is coded, of whole blocks.
  uint64_t start, stop;
  DevicePlane shared, shared_scales, mask, signs;
  DevicePlane coded;  // in place of mask and signs; where it is cut, of the blocks of start .. stop alone
  uint64_t head = 0;  // bytes of it before its blocks
  std::shared_ptr<const TernaryPlane> ternary;
};

struct DevicePlan {
  std::vector<DeviceTensor> tensors;
  std::list<std::vector<uint8_t>> read;  // what does not lie in memory as it is wanted
};

class Decoder {
 public:
  // All of them outlive it.
  Decoder(const File& file, const File::Fetch& fetch, const Options& options);

  Job job(const Request& request) const;
  // A tensor of a merged model: the base's where no task has a mask.
  Job merged_job(const Request& request, const Merging& merging) const;
  // The masks of a tensor, to be counted.
  Job counting_job(uint32_t tensor, const std::vector<uint32_t>& tasks) const;
  // The tasks that have a mask for a tensor, all codings known.
  std::vector<uint32_t> masked_tasks(uint32_t tensor) const;

  void run(const std::vector<Job>& jobs);
  // What a device takes that has the planes `there` already, whole.
  DevicePlan device_plan(const std::vector<Job>& jobs, const std::set<uint32_t>& there);
  Loaded load(const std::vector<Job>& jobs);
  // Adds what the masks of one unit say; counts.agreement and counts.overlap have their sizes.
  void count_unit(const Job& job, uint64_t unit, unsigned worker, MaskCounts& counts);
  std::vector<uint8_t> whole_plane(uint32_t id) const;

  // A plane as it is stored, of whatever kind and coding.
  PlaneBytes stored_plane(uint32_t id) const;
  // The checksum of block `block` of a plane whose bytes from that block's beginning are given.
  bool intact(const PlaneBytes& plane, uint64_t block, const uint8_t* bytes) const;
  // Whether a tensor of a task has a coded mask or ternary plane, and everything else it takes to decode
  // it is known.
  bool is_coded(uint32_t task, uint32_t tensor) const;
  // Decodes such a plane to nowhere; throws where it is not sound.
  void try_plane(uint32_t task, uint32_t tensor) const;

 private:
  // What a thread reads into or computes.
  struct Buffers {
    std::vector<uint8_t> base, mask, signs;
    std::vector<std::vector<uint8_t>> coded;  // masks, by their number in the job
  };

  struct Ternary {
    const uint8_t *mask, *signs;
  };

  PlaneBytes known_plane(uint32_t id) const;
  MaskPlane mask_plane(uint32_t id) const;
  template <class Read>
  void read_head(const PlaneBytes& plane, Read read) const;
  PlaneBytes base_plane(const Request& request, uint32_t id) const;
  void use_shared(Job& j, const TensorRecord& t) const;
  void use_masks(Job& j, uint32_t tensor, const std::vector<uint32_t>& tasks) const;
  void use_ternary(Job& j, const EntryRecord& e) const;

  const uint8_t* view(const PlaneBytes& plane, uint64_t at, uint64_t size,
                      std::vector<uint8_t>& buffer) const;
  void check(const PlaneBytes& plane, const uint8_t* bytes, uint64_t at, uint64_t size) const;
  void compare(const PlaneBytes& plane, uint64_t at, uint64_t size, const uint64_t* hashes) const;
  [[noreturn]] void damaged(const PlaneBytes& plane, uint64_t block) const;
  const uint8_t* part(const PlaneBytes& plane, uint64_t begin, uint64_t end) const;
  std::pair<const uint8_t*, uint64_t> block(const PlaneBytes& plane, const CodedBlocks& blocks,
                                            uint64_t number) const;
  const uint8_t* shared_part(const Job& job, uint64_t begin, uint64_t end) const;
  const float* shared_scales(const Job& job, uint64_t first, uint64_t end) const;
  std::vector<const uint8_t*> unit_masks(const Job& job, uint64_t first, uint64_t end,
                                         Buffers& buffers) const;
  const uint8_t* consensus(const Job& job, uint64_t first, uint64_t end, Buffers& buffers) const;
  Ternary unit_ternary(const Job& job, uint64_t first, uint64_t end, Buffers& buffers) const;
  void decode_unit(const Job& job, uint64_t unit, Buffers& buffers) const;
  void load_part(const Job& job, uint64_t part, Buffers& buffers, Loaded& to) const;
  template <class Body>
  void for_each_part(const std::vector<Job>& jobs, Body body);
  void inflate(const PlaneBytes& plane, uint8_t* out) const;
  void copy(const PlaneBytes& plane, uint64_t begin, uint64_t end, uint8_t* out,
            std::vector<uint8_t>& buffer) const;
  void copy_part(const Job& job, uint64_t part, Buffers& buffers) const;
  [[noreturn]] void unsound(const PlaneBytes& plane, const Error& e) const;

  const File& file_;
  const Index& index_;
  const File::Fetch& fetch_;
  const Options& options_;
  const Kernels& kernels_;
  std::vector<Buffers> buffers_;  // one per worker
};

}  // namespace tallcodec
