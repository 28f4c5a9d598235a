// tallcodec for C++ programs: open a `.tall` file, ask what it holds, decode into your own memory.
#pragma once
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "dtype.h"

namespace tallcodec {

struct Index;

struct Kernels;

constexpr uint32_t kNone = 0xFFFFFFFF;

enum class Status {
  Argument, Checkpoint, Format, Version, Checksum, BaseMismatch, TaskNotFound, TensorNotFound, Read, Write,
  Device
};

// The one exception the core throws (beside std::bad_alloc). system_error is an errno, or 0.
class Error : public std::exception {
 public:
  Error(Status status, std::string message, int system_error = 0)
      : status(status), message(std::move(message)), system_error(system_error) {}
  const char* what() const noexcept override { return message.c_str(); }

  Status status;
  std::string message;
  int system_error;
};

// Bytes somewhere else: in memory, or in a file that is read with pread.
struct Source {
  const uint8_t* memory = nullptr;
  int fd = -1;
  uint64_t offset = 0;

  explicit operator bool() const { return memory || fd >= 0; }
  // Bytes [position, position + size): a pointer into memory, or `buffer` filled from the file.
  // Throws Error(Status::Read).
  const uint8_t* view(uint64_t position, uint64_t size, std::vector<uint8_t>& buffer) const;
};

// Whether two sources hold the same `size` bytes. Stops at the first difference.
bool same_bytes(const Source& a, const Source& b, uint64_t size);

struct Range {
  uint64_t offset, size;
};

// What a task has under a name.
struct TensorInfo {
  DType dtype;
  std::vector<uint64_t> shape;
  uint64_t nbytes;
};

struct Request {
  uint32_t task;    // kNone: the base
  uint32_t tensor;
  void* out;        // the elements that are wanted, of TensorInfo::dtype
  Source base{};    // the base's tensor, where the file only references its base
  uint64_t first = 0, count = UINT64_MAX;  // those elements; of `count`, as many as there are
};

// A merged model: base + scale * s on elements on which `min_tasks` masks or more are set, 0: on all.
struct Merging {
  uint32_t min_tasks;
  float scale;
};

// What a tensor's stored masks say of its n elements, over the tasks that have one. None sets a bit
// where the shared vector is 0.
struct MaskCounts {
  std::vector<uint32_t> tasks;      // those that have a mask
  uint64_t zeros = 0;               // elements on which the shared vector is 0
  std::vector<uint64_t> agreement;  // [tasks + 1] of the others, those on which just k masks are set
  std::vector<uint64_t> overlap;    // [tasks * tasks] elements on which both masks are set
};

// A task's planes as decoding uses them, raw, in memory: masks, ternary planes, scales per row, verbatim ones.
struct Loaded {
  std::map<uint32_t, std::vector<uint8_t>> planes;  // by number

  uint64_t bytes() const {
    uint64_t sum = 0;
    for (const auto& [id, plane] : planes) sum += plane.size();
    return sum;
  }
};

struct Options {
  unsigned threads = 1;
  bool verify = true;                // check every block of the file that is used against its checksum
  bool drop_cache = false;           // encoding: let the page cache let go of what has been read
  const Loaded* loaded = nullptr;    // planes to use in place of the file's
  const Kernels* kernels = nullptr;  // null: the best this CPU runs
  // Called now and then by the calling thread, with what is being done and how far it is; may throw.
  std::function<void(const char* step, uint64_t done, uint64_t total)> poll;
  // Decompresses one zstd frame into exactly raw_size bytes, or throws Error(Status::Format). Needed for
  // zstd planes only; called from any thread.
  std::function<void(const uint8_t* data, uint64_t size, uint8_t* out, uint64_t raw_size)> inflate;
};

struct Damage {
  uint32_t plane;
  uint64_t block;
};

// An open file. Immutable; any number of threads may use it at once.
class File {
 public:
  // Gives the bytes [offset, offset + size) of the file, valid for as long as the File is.
  using Fetch = std::function<const uint8_t*(uint64_t offset, uint64_t size)>;

  // Reads header and index. `label` names the file in messages.
  File(std::string label, uint64_t file_size, Fetch fetch);

  const Index& index() const { return *index_; }
  uint64_t identity() const { return identity_; }  // the index's checksum
  Range index_range() const { return index_range_; }
  uint64_t size() const { return size_; }  // where the file ends; bytes behind it are ignored
  const std::string& label() const { return label_; }
  std::vector<std::string> tasks() const;    // their names, by number
  std::vector<std::string> tensors() const;  // those of the base and of all tasks, sorted
  uint32_t find_task(std::string_view name) const;    // throws Error(Status::TaskNotFound)
  uint32_t find_tensor(std::string_view name) const;  // throws Error(Status::TensorNotFound)
  bool has(uint32_t task, uint32_t tensor) const;     // task kNone: the base
  TensorInfo info(uint32_t task, uint32_t tensor) const;
  // The byte ranges of the file that decoding the tensor reads.
  std::vector<Range> ranges(uint32_t task, uint32_t tensor) const;
  bool needs_base(uint32_t task, uint32_t tensor) const;  // a Source in the Request
  // Throws where decoding would need a newer reader. Sizes of other tensors than these are what they claim.
  void require_known(uint32_t task, uint32_t tensor) const;

  void decode(const std::vector<Request>& requests, const Options& options) const;
  // The planes that only these tensors of a task use, unpacked, for later decoding; everything it will read
  // is checked now. Of a Request tensor and base count.
  Loaded load(uint32_t task, const std::vector<Request>& requests, const Options& options) const;
  // Tensors of a model merged from the shared vector and the masks: the base's, in its types and
  // shapes, changed where tasks have masks. Request::task is kNone.
  void merge(const std::vector<Request>& requests, const Merging& merging,
             const Options& options) const;
  std::vector<MaskCounts> count_masks(const std::vector<uint32_t>& tensors,
                                      const Options& options) const;
  // The decoded bytes of a plane of kind verbatim or file.
  std::vector<uint8_t> read_plane(uint32_t plane, const Options& options) const;
  // Every block of the file that does not match its checksum. Throws Error(Status::Format) where all do
  // and yet a coded plane is not sound.
  std::vector<Damage> verify(const Options& options) const;
  // What a plane belongs to, for messages: "mask of tensor 'a', task 'b'".
  std::string describe(uint32_t plane) const;
  std::vector<std::string> describe(const std::vector<uint32_t>& planes) const;

 private:
  std::string label_;
  Fetch fetch_;
  uint64_t identity_, size_;
  Range index_range_;
  std::shared_ptr<const Index> index_;
};

}  // namespace tallcodec
