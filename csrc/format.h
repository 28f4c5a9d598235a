// The `.tall` format, version 1: docs/format.md is the specification, these are its records.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kernels.h"
#include "tallcodec.h"

namespace tallcodec {

constexpr uint8_t kMagic[8] = {0x89, 'T', 'A', 'L', 'L', '\r', '\n', 0x1a};
constexpr uint32_t kVersion = 1;
constexpr uint64_t kAlign = 64;
constexpr uint64_t kCopyChunk = 32 * kSumBlock;  // bytes at a time where nothing is computed
constexpr uint64_t kUnit = 524288;     // elements per statistics unit; a mask's checksum block
constexpr uint64_t kMaxZstdRatio = 32768;  // raw bytes per byte of a zstd frame, at most
constexpr uint64_t kMaxZstdSize = 64 << 20;  // raw bytes of one
constexpr uint8_t kMaxRank = 32;
constexpr uint32_t kScopeBase = 0xFFFFFFFF;
constexpr uint32_t kScopeFile = 0xFFFFFFFE;

constexpr uint64_t align64(uint64_t x) { return (x + (kAlign - 1)) & ~(kAlign - 1); }
constexpr uint64_t sum_count(uint64_t size) { return (align64(size) + kSumBlock - 1) / kSumBlock; }

enum class PlaneKind : uint8_t { Base = 1, Shared, Mask, Ternary, Scales, Verbatim, File };
constexpr bool is_known(PlaneKind kind) {
  return kind >= PlaneKind::Base && kind <= PlaneKind::File;
}
enum class PlaneCoding : uint8_t { Raw = 0, Zstd, External, Gaps, Conditional };
enum class BaseStorage : uint8_t { Embedded = 1, Referenced };
enum class Merge : uint8_t { TaskArithmetic = 1, Average, Ties };
enum class ScaleMode : uint8_t { None = 0, UnitGain, UnitGainRow };
enum class Method : uint8_t { Tall = 1, Magnitude, Adapted, Ternary };
constexpr bool is_known(Method method) {
  return method >= Method::Tall && method <= Method::Ternary;
}
enum class Coding : uint8_t { Base = 0, Mask, Verbatim, Absent, Ternary };
enum class Reason : uint8_t {
  None = 0, DType, Shape, NotInBase, NonfiniteTask, NonfiniteBase
};

struct Slot {
  uint64_t sequence, index_offset, index_size, index_hash, file_size;
  uint64_t reserved[2];
  uint64_t slot_hash;
};
static_assert(sizeof(Slot) == 64);

struct Header {
  uint8_t magic[8];
  uint32_t version, header_size;
  uint8_t reserved[48];
  Slot slot[2];
};
static_assert(sizeof(Header) == 192);

struct StringRef {
  uint32_t offset, length;
};

struct IndexHeader {
  uint32_t tensors, tasks, planes, free, files, metas;
  uint64_t dims, sums, counts, strings;
  StringRef writer;
  BaseStorage base_storage;
  Merge merge;
  ScaleMode scale;
  uint8_t reserved[61];
};
static_assert(sizeof(IndexHeader) == 128);

struct TensorRecord {
  StringRef name;
  uint32_t dims;
  uint8_t rank;
  DType dtype;
  DType shared_dtype;
  uint8_t in_base;
  uint32_t base_plane, shared_plane, shared_scales_plane, alias;
  uint32_t first_count, count_count;
  uint8_t reserved[24];
};
static_assert(sizeof(TensorRecord) == 64);

struct TaskRecord {
  StringRef name;
  float threshold;
  Method method;
  uint8_t reserved[51];
};
static_assert(sizeof(TaskRecord) == 64);

struct EntryRecord {
  Coding coding;
  DType dtype;
  uint8_t rank;
  Reason reason;
  uint32_t dims;
  uint32_t plane, scales_plane;
  float scale;
  float factor;
  uint64_t set_bits, published_bits;
  double tau_sq, dot, approx_sq;
};
static_assert(sizeof(EntryRecord) == 64);

struct PlaneRecord {
  PlaneKind kind;
  PlaneCoding coding;
  uint8_t reserved[6];
  uint64_t offset, size, raw_size, first_sum;
};
static_assert(sizeof(PlaneRecord) == 40);
constexpr bool is_known(const PlaneRecord& p) {
  return is_known(p.kind) && p.coding <= PlaneCoding::Conditional;
}

struct FreeRange {
  uint64_t offset, size;
};
static_assert(sizeof(FreeRange) == 16);

struct FileRecord {
  uint32_t scope, plane;
  StringRef name;
};
static_assert(sizeof(FileRecord) == 16);

struct MetaRecord {
  uint32_t scope;
  uint8_t reserved[4];
  StringRef key, value;
};
static_assert(sizeof(MetaRecord) == 24);

inline EntryRecord absent_entry() {
  EntryRecord e{};
  e.coding = Coding::Absent;
  e.plane = e.scales_plane = kNone;
  return e;
}

// The index in memory: the same records, in vectors.
struct Index {
  IndexHeader header{};
  std::vector<TensorRecord> tensors;
  std::vector<TaskRecord> tasks;
  std::vector<EntryRecord> entries;
  std::vector<PlaneRecord> planes;
  std::vector<FreeRange> free;
  std::vector<FileRecord> files;
  std::vector<MetaRecord> metas;
  std::vector<uint64_t> dims, sums, counts;
  std::string strings;

  std::string_view text(StringRef s) const {
    return std::string_view(strings).substr(s.offset, s.length);
  }
  const EntryRecord& entry(uint32_t task, uint32_t tensor) const {
    return entries[uint64_t{task} * tensors.size() + tensor];
  }
  uint64_t elements(uint32_t first_dim, uint8_t rank) const {
    uint64_t n = 1;
    for (uint8_t i = 0; i < rank; ++i) n *= dims[first_dim + i];
    return n;
  }
  // A tensor's own number, or that of the one it is tied to.
  uint32_t original(uint32_t tensor) const {
    uint32_t alias = tensors[tensor].alias;
    return alias == kNone ? tensor : alias;
  }
  uint64_t rows(const TensorRecord& t) const { return t.rank < 2 ? 1 : dims[t.dims]; }
};

// reader.cpp. `label` names the file in messages. Both throw Error(Status::Format or ::Version).
// The current slot of a file that is file_size bytes long, from its first bytes.
Slot read_header(const std::string& label, const void* data, uint64_t size, uint64_t file_size);
// The index, every count, offset, size and name in it checked.
Index read_index(const std::string& label, const void* data, uint64_t size, const Slot& slot);

// writer.cpp
// The sum of a plane's block of `size` bytes, at most kSumBlock, with its padding if it has none yet.
uint64_t hash_block(const Kernels& kernels, const uint8_t* bytes, uint64_t size);
uint64_t hash_slot(const Header& header, const Slot& slot);
// Whether a slot is neither empty nor damaged.
bool is_right(const Header& header, const Slot& slot);
Slot make_slot(const Header& header, uint64_t sequence, uint64_t index_offset, std::string_view index,
               uint64_t file_size);
// Throws Error(Status::Write).
void write_all(int fd, const std::string& label, const void* data, uint64_t size, uint64_t offset);
std::string write_index(Index& index);  // fills in the header's counts
Header write_header(uint64_t index_offset, std::string_view index, uint64_t file_size);

}  // namespace tallcodec
