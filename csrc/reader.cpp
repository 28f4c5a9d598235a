// Bytes to header and index. Nothing in a file is believed before it is checked here.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <unordered_set>

#include "format.h"
#include "kernels.h"
#include "text.h"

namespace tallcodec {
namespace {

[[noreturn]] void fail(Status status, const std::string& label, const std::string& what) {
  throw Error(status, text(label, ": ", what));
}

// Sums and products that stop at the largest number in place of wrapping, so that one comparison with a
// true size decides.
uint64_t add(uint64_t a, uint64_t b) { return a > UINT64_MAX - b ? UINT64_MAX : a + b; }
uint64_t multiply(uint64_t a, uint64_t b) {
  return a != 0 && b > UINT64_MAX / a ? UINT64_MAX : a * b;
}

bool all_zero(const void* data, size_t size) {
  auto bytes = static_cast<const uint8_t*>(data);
  return std::all_of(bytes, bytes + size, [](uint8_t b) { return b == 0; });
}

bool valid_utf8(std::string_view s) {
  for (size_t i = 0; i < s.size();) {
    auto at = [&](size_t k) { return static_cast<uint8_t>(i + k < s.size() ? s[i + k] : 0); };
    auto follows = [&](size_t k) { return (at(k) & 0xC0) == 0x80; };
    uint8_t c = at(0);
    if (c < 0x80) {
      i += 1;
    } else if (c >= 0xC2 && c <= 0xDF && follows(1)) {
      i += 2;
    } else if (c >= 0xE0 && c <= 0xEF && follows(1) && follows(2)) {
      bool overlong = c == 0xE0 && at(1) < 0xA0;
      bool surrogate = c == 0xED && at(1) >= 0xA0;
      if (overlong || surrogate) return false;
      i += 3;
    } else if (c >= 0xF0 && c <= 0xF4 && follows(1) && follows(2) && follows(3)) {
      bool overlong = c == 0xF0 && at(1) < 0x90;
      bool beyond = c == 0xF4 && at(1) >= 0x90;
      if (overlong || beyond) return false;
      i += 4;
    } else {
      return false;
    }
  }
  return true;
}

bool valid_name(std::string_view s) {
  return valid_utf8(s) && std::none_of(s.begin(), s.end(), [](char c) {
    return static_cast<uint8_t>(c) < 0x20 || c == 0x7F;
  });
}

bool valid_file_name(std::string_view s) {
  return valid_name(s) && !s.empty() && s != "." && s != ".." &&
         s.find_first_of("/\\") == s.npos;
}

// Takes the sections of an index off its front.
class Cursor {
 public:
  Cursor(const std::string& label, const uint8_t* data, uint64_t size)
      : label_(label), data_(data), left_(size) {}

  template <class T>
  void take(std::vector<T>& out, uint64_t count, const char* what) {
    uint64_t bytes = multiply(count, sizeof(T));
    if (bytes > left_) {
      fail(Status::Format, label_,
           text("the index is too short for its ", count, " ", what, " records"));
    }
    out.resize(count);
    if (bytes) std::memcpy(out.data(), data_, bytes);
    data_ += bytes;
    left_ -= bytes;
  }
  uint64_t left() const { return left_; }
  const uint8_t* data() const { return data_; }

 private:
  const std::string& label_;
  const uint8_t* data_;
  uint64_t left_;
};

// Names a tensor, or a task's, in a message; written out only where one is.
struct Who {
  const Index& index;
  size_t tensor;
  size_t task = kNone;
};

std::ostream& operator<<(std::ostream& out, const Who& who) {
  out << "tensor '" << who.index.text(who.index.tensors[who.tensor].name) << "'";
  if (who.task != kNone) {
    out << " of task '" << who.index.text(who.index.tasks[who.task].name) << "'";
  }
  return out;
}

// What docs/format.md demands of an index, and more: all that reading by it could trip over.
class Validator {
 public:
  Validator(const std::string& label, const Index& index, const Slot& slot)
      : label_(label), index_(index), slot_(slot) {}

  void run() {
    header();
    planes();
    layout();
    tensors();
    tasks();
    entries();
    files();
    metas();
  }

 private:
  template <class... Parts>
  void require(bool ok, const Parts&... parts) const {
    if (!ok) fail(Status::Format, label_, text("invalid index: ", parts...));
  }
  template <class... Parts>
  void require_known(bool ok, const Parts&... parts) const {
    if (!ok) fail(Status::Version, label_, text(parts..., "; a newer tallcodec is needed"));
  }
  template <class... What>
  void require_zero(const void* data, size_t size, const What&... what) const {
    require_known(all_zero(data, size), "reserved bytes of ", what..., " are in use");
  }

  std::string_view string(StringRef s, const char* what) const {
    require(add(s.offset, s.length) <= index_.strings.size(), what, " lies outside the strings");
    // Or a small file could have any number of long names, which whoever lists them would hold.
    named_ += s.length;
    require(named_ <= index_.strings.size(), "names and values are longer than all strings");
    return index_.text(s);
  }

  // The number of elements of a shape, or a failure where it does not fit 63 bits.
  uint64_t elements(uint32_t dims, uint8_t rank, const Who& who) const {
    require(rank ? add(dims, rank) <= index_.dims.size() : dims == 0, who,
            ": dims lie outside the table");
    require(rank <= kMaxRank, who, " has rank ", int(rank));
    uint64_t n = 1;
    bool empty = false;
    for (uint8_t i = 0; i < rank; ++i) {
      uint64_t d = index_.dims[dims + i];
      if (d == 0) empty = true;
      n = multiply(n, d ? d : 1);
    }
    require(n <= uint64_t{INT64_MAX} / 16, who, ": the shape is absurdly large");
    return empty ? 0 : n;
  }

  // A plane that a record names: its kind, and its raw size.
  void plane(uint32_t id, PlaneKind kind, uint64_t raw_size, const Who& who) const {
    if (raw_size == 0) {
      require(id == kNone, who, " has no elements but a plane");
      return;
    }
    require(id < index_.planes.size(), who, " names plane ", id, " of ", index_.planes.size());
    const PlaneRecord& p = index_.planes[id];
    if (!is_known(p.kind)) return;  // of a newer writer; refused when it is asked for
    require(p.kind == kind, who, " names a plane of another kind (", int(p.kind), ")");
    require(p.raw_size == raw_size, who, ": its plane has ", p.raw_size, " bytes, its shape makes ",
            raw_size);
  }

  void header() const {
    const IndexHeader& h = index_.header;
    require_zero(h.reserved, sizeof h.reserved, "the index header");
    string(h.writer, "the writer's name");
    require(valid_name(index_.text(h.writer)), "the writer's name is not printable UTF-8");
    require_known(h.base_storage == BaseStorage::Embedded ||
                      h.base_storage == BaseStorage::Referenced,
                  "unknown base storage ", int(h.base_storage));
  }

  void planes() const {
    for (size_t i = 0; i < index_.planes.size(); ++i) {
      const PlaneRecord& p = index_.planes[i];
      require_zero(p.reserved, sizeof p.reserved, "plane ", i);
      bool external = p.coding == PlaneCoding::External;
      if (external) {
        require((p.kind == PlaneKind::Base || !is_known(p.kind)) && p.offset == 0 && p.size == 0,
                "plane ", i, " is external but no plane of a base, or has bytes");
        require(index_.header.base_storage == BaseStorage::Referenced, "plane ", i,
                " is external in a file that embeds its base");
      } else {
        require(p.size != 0, "plane ", i, " is empty");
        require(p.kind != PlaneKind::Base ||
                    index_.header.base_storage == BaseStorage::Embedded,
                "plane ", i, " is a base's in a file that references its base");
      }
      require(p.raw_size != 0, "plane ", i, " has raw size 0");
      if (p.coding == PlaneCoding::Raw) {
        require(p.size == p.raw_size, "plane ", i, " is raw but its size and raw size differ");
      }
      if (p.coding == PlaneCoding::Gaps) {
        require(p.kind == PlaneKind::Ternary || !is_known(p.kind), "plane ", i,
                " is coded by gaps but not ternary");
      }
      if (p.coding == PlaneCoding::Conditional) {
        require(p.kind == PlaneKind::Mask || !is_known(p.kind), "plane ", i,
                " is coded given a shared vector but no mask");
      }
      if (p.coding == PlaneCoding::Zstd) {
        require(p.kind == PlaneKind::Verbatim || p.kind == PlaneKind::File || !is_known(p.kind),
                "plane ", i,
                " is a zstd frame but neither verbatim nor a file");
        require(p.raw_size <= std::min(multiply(p.size, kMaxZstdRatio), kMaxZstdSize), "plane ", i,
                " claims more bytes than a zstd frame, or one of its size, can hold");
      }
      uint64_t bytes = external ? p.raw_size : p.size;
      require(bytes <= uint64_t{INT64_MAX}, "plane ", i, " is absurdly large");
      require(add(p.first_sum, sum_count(bytes)) <= index_.sums.size(), "plane ", i,
              ": checksums lie outside the table");
      if (i > 0) {
        const PlaneRecord& before = index_.planes[i - 1];
        bool ascending = before.coding == PlaneCoding::External ? external
                                                                : external || p.offset > before.offset;
        require(ascending, "plane ", i, " is out of order");
      }
    }
  }

  // Planes, free ranges and the index tile the file behind the header.
  void layout() const {
    uint64_t position = sizeof(Header);
    size_t next_free = 0;
    bool index_passed = false;
    auto pass = [&](uint64_t size, const char* what) {
      position = add(position, size);
      require(position <= slot_.file_size, what, " reaches beyond the end of the file");
    };
    auto pass_others = [&] {  // free ranges and the index that begin here
      for (bool moved = true; moved;) {
        moved = false;
        if (next_free < index_.free.size() && index_.free[next_free].offset == position) {
          const FreeRange& f = index_.free[next_free++];
          require(f.size != 0 && f.size % kAlign == 0, "a free range of ", f.size, " bytes");
          pass(f.size, "a free range");
          moved = true;
        }
        if (!index_passed && slot_.index_offset == position) {
          pass(slot_.index_size, "the index");
          index_passed = moved = true;
        }
      }
    };
    pass_others();
    for (size_t i = 0; i < index_.planes.size(); ++i) {
      const PlaneRecord& p = index_.planes[i];
      if (p.coding == PlaneCoding::External) break;
      require(p.offset == position, "plane ", i, " begins at ", p.offset, ", not at ", position,
              ": planes overlap or leave a hole");
      pass(align64(p.size), "a plane");
      pass_others();
    }
    require(next_free == index_.free.size() && index_passed && position == slot_.file_size,
            "planes, free ranges and index do not tile the file: tiled up to ", position, " of ",
            slot_.file_size);
  }

  void tensors() const {
    std::string_view previous;
    for (size_t i = 0; i < index_.tensors.size(); ++i) {
      const TensorRecord& t = index_.tensors[i];
      std::string_view name = string(t.name, "a tensor's name");
      require(valid_name(name), "tensor ", i, ": the name is not printable UTF-8");
      require(i == 0 || previous < name, "tensor '", name, "' is out of order or there twice");
      previous = name;
      Who who{index_, i};
      require_zero(t.reserved, sizeof t.reserved, who);

      uint64_t n = elements(t.dims, t.rank, who);
      require(t.in_base <= 1, who, ": bad mark for its presence in the base");
      if (t.in_base) {
        require_known(size_of(t.dtype) != 0, who, " has unknown element type ", int(t.dtype));
      } else {
        require(t.dtype == DType{} && t.rank == 0, who, " is not in the base but has a shape there");
      }
      require(t.count_count ? add(t.first_count, t.count_count) <= index_.counts.size()
                            : t.first_count == 0,
              who, ": counts lie outside the table");
      require(t.count_count <= index_.tasks.size() + 1, who, " has counts of more tasks than there are");
      if (t.alias != kNone) {
        alias(t, i, who);
        continue;
      }
      plane(t.base_plane, PlaneKind::Base, t.in_base ? n * size_of(t.dtype) : 0, who);
      shared(t, n, who);
    }
  }

  void alias(const TensorRecord& t, size_t i, const Who& who) const {
    require(t.alias < i && index_.tensors[t.alias].alias == kNone, who, " is an alias of nothing");
    const TensorRecord& target = index_.tensors[t.alias];
    const uint64_t* dims = index_.dims.data();
    require(t.in_base && target.in_base && t.dtype == target.dtype && t.rank == target.rank &&
                std::equal(dims + t.dims, dims + t.dims + t.rank, dims + target.dims),
            who, " differs in type or shape from what it is an alias of");
    require(t.base_plane == kNone && t.shared_plane == kNone && t.shared_scales_plane == kNone &&
                t.shared_dtype == DType{} && t.count_count == 0,
            who, " is an alias but has planes or counts of its own");
  }

  void shared(const TensorRecord& t, uint64_t n, const Who& who) const {
    if (t.shared_dtype == DType{}) {
      require(t.shared_plane == kNone && t.shared_scales_plane == kNone, who,
              " has a shared plane of no type");
      return;
    }
    bool int8 = t.shared_dtype == DType::I8;
    require_known(int8 || is_arithmetic(t.shared_dtype), who,
                  ": shared vector of unknown element type ", int(t.shared_dtype));
    require(t.in_base && is_arithmetic(t.dtype), who, " has a shared vector but no arithmetic base");
    plane(t.shared_plane, PlaneKind::Shared, n * size_of(t.shared_dtype), who);
    plane(t.shared_scales_plane, PlaneKind::Scales,
          int8 ? (n + kScaleBlock - 1) / kScaleBlock * 4 : 0, who);
  }

  void tasks() const {
    std::unordered_set<std::string_view> names;
    for (size_t i = 0; i < index_.tasks.size(); ++i) {
      const TaskRecord& t = index_.tasks[i];
      std::string_view name = string(t.name, "a task's name");
      require(valid_name(name) && !name.empty(), "task ", i, ": the name is not printable UTF-8");
      require(names.insert(name).second, "task '", name, "' is there twice");
      require_zero(t.reserved, sizeof t.reserved, "a task");
    }
  }

  void entries() const {
    std::vector<bool> taken(index_.planes.size());
    for (uint32_t task = 0; task < index_.tasks.size(); ++task) {
      for (uint32_t i = 0; i < index_.tensors.size(); ++i) {
        const EntryRecord& e = index_.entry(task, i);
        const TensorRecord& t = index_.tensors[i];
        if (t.alias != kNone) {
          require(all_zero(&e, sizeof e), "tensor '", index_.text(t.name),
                  "' is an alias but has an entry of its own");
        } else {
          const Who who{index_, i, task};
          entry(e, t, index_.tasks[task].method, who);
          if (e.coding != Coding::Mask && e.coding != Coding::Ternary) continue;
          for (uint32_t plane : {e.plane, e.scales_plane}) {
            if (plane == kNone) continue;
            require(!taken[plane], who, " names plane ", plane, ", which another entry has");
            taken[plane] = true;
          }
        }
      }
    }
  }

  void entry(const EntryRecord& e, const TensorRecord& t, Method method, const Who& who) const {
    if (e.coding > Coding::Ternary) return;  // of a newer writer; refused when it is asked for
    if (e.coding == Coding::Absent) {
      const EntryRecord bare = absent_entry();
      require(std::memcmp(&e, &bare, sizeof e) == 0, who, " is absent but has properties");
      return;
    }
    uint64_t n = elements(e.dims, e.rank, who);
    require_known(size_of(e.dtype) != 0, who, " has unknown element type ", int(e.dtype));
    if (e.coding != Coding::Mask && e.coding != Coding::Ternary) {
      require(e.scale == 1 && e.scales_plane == kNone && e.factor == 0 && !e.set_bits &&
                  !e.published_bits && e.tau_sq == 0 && e.dot == 0 && e.approx_sq == 0,
              who, " has no mask but statistics, scales or the factor of one");
    }
    if (e.coding == Coding::Verbatim) {
      require(e.reason != Reason::None, who, " is verbatim for no reason");
      plane(e.plane, PlaneKind::Verbatim, n * size_of(e.dtype), who);
      return;
    }
    require(t.in_base && e.rank == t.rank && e.dims == t.dims, who,
            " is coded against the base but has no shape or another one there");
    require(e.reason == Reason::None, who, " is not verbatim but says why it is");
    if (e.coding == Coding::Base) {
      require(e.dtype == t.dtype && e.plane == kNone, who, " is as the base but differs from it");
      return;
    }
    if (e.coding == Coding::Ternary) {
      require(is_arithmetic(t.dtype) && is_arithmetic(e.dtype) && n > 0, who,
              " has a ternary plane but no arithmetic element type");
      require(e.set_bits == e.published_bits && e.set_bits <= n && e.factor == 0 &&
                  e.scales_plane == kNone && std::isfinite(e.scale),
              who, " has a ternary plane and what belongs to a mask");
      plane(e.plane, PlaneKind::Ternary, 2 * ((n + 7) / 8), who);
      return;
    }
    require(is_arithmetic(e.dtype) && n > 0 && t.shared_plane != kNone, who,
            " has a mask but no shared vector or no arithmetic element type");
    require(e.set_bits <= e.published_bits && e.published_bits <= n, who,
            " has impossible numbers of mask bits");
    if (method == Method::Adapted) {
      require(std::isnormal(e.factor) && e.factor > 0, who, " has an adapted mask but no factor");
    } else if (is_known(method)) {
      require(e.factor == 0, who, " has a factor but no adapted mask");
    }
    plane(e.plane, PlaneKind::Mask, (n + 7) / 8, who);
    if (e.scales_plane != kNone) {
      require(e.scale == 1, who, " has scales per row and another scale");
      plane(e.scales_plane, PlaneKind::Scales, index_.rows(t) * 4, who);
    }
  }

  void files() const {
    std::unordered_set<std::string> seen;
    for (const FileRecord& f : index_.files) {
      std::string_view name = string(f.name, "a file's name");
      require(valid_file_name(name), "a file's name is no plain name");
      require(f.scope == kScopeBase || f.scope < index_.tasks.size(), "file '", name,
              "' belongs to no task");
      require(seen.insert(text(f.scope, '/', name)).second, "file '", name, "' is there twice");
      if (f.plane != kNone) {
        require(f.plane < index_.planes.size(), "file '", name, "' names no plane");
        PlaneKind kind = index_.planes[f.plane].kind;
        require(kind == PlaneKind::File || !is_known(kind), "file '", name,
                "' names a plane of another kind");
      }
    }
  }

  void metas() const {
    std::unordered_set<std::string> seen;
    for (const MetaRecord& m : index_.metas) {
      std::string_view key = string(m.key, "a metadata key");
      std::string_view value = string(m.value, "a metadata value");
      require(valid_utf8(key) && valid_utf8(value), "metadata is not UTF-8");
      require_zero(m.reserved, sizeof m.reserved, "metadata");
      require(m.scope >= kScopeFile || m.scope < index_.tasks.size(), "metadata '", key,
              "' belongs to no task");
      require(seen.insert(text(m.scope, '/', key)).second, "metadata '", key, "' is there twice");
    }
  }

  const std::string& label_;
  const Index& index_;
  const Slot& slot_;
  mutable uint64_t named_ = 0;  // bytes of the strings that records have named
};

}  // namespace

Slot read_header(const std::string& label, const void* data, uint64_t size, uint64_t file_size) {
  // The magic's first five bytes survive what a text-mode transfer does to line endings.
  if (size == 0 || std::memcmp(data, kMagic, std::min<uint64_t>(size, sizeof kMagic)) != 0) {
    bool text_mode = size >= sizeof kMagic && std::memcmp(data, kMagic, 5) == 0;
    fail(Status::Format, label,
         text_mode ? "not a valid .tall file: its line endings were changed, as by a text-mode "
                     "transfer; copy it again in binary"
                   : "not a .tall file: it does not begin as one");
  }
  if (size < sizeof(Header)) {
    fail(Status::Format, label, text("truncated: ", file_size, " bytes are not even a header"));
  }
  Header header;
  std::memcpy(&header, data, sizeof header);
  if (header.version != kVersion) {
    fail(header.version > kVersion ? Status::Version : Status::Format, label,
         text("format version ", header.version, "; this tallcodec reads version ", kVersion));
  }

  const Slot* current = nullptr;
  for (const Slot& slot : header.slot) {
    if (is_right(header, slot) && (!current || slot.sequence > current->sequence)) current = &slot;
  }
  if (!current) {
    throw Error(Status::Checksum, text(label, ": the header is damaged: no slot has a right checksum"));
  }
  const Slot& slot = *current;
  if (header.header_size != sizeof header || !all_zero(header.reserved, sizeof header.reserved) ||
      !all_zero(slot.reserved, sizeof slot.reserved)) {
    fail(Status::Version, label, "the header uses reserved bytes; a newer tallcodec is needed");
  }
  if (file_size < slot.file_size) {
    fail(Status::Format, label, text("truncated: ", file_size, " of ", slot.file_size, " bytes are there"));
  }
  if (slot.index_offset % kAlign || slot.index_size % kAlign || slot.file_size % kAlign ||
      slot.index_offset < sizeof header || slot.index_size < sizeof(IndexHeader) ||
      add(slot.index_offset, slot.index_size) > slot.file_size) {
    fail(Status::Format, label, "the header points to an index outside the file");
  }
  return slot;
}

Index read_index(const std::string& label, const void* data, uint64_t size, const Slot& slot) {
  if (size != slot.index_size || find_kernels("scalar")->hash(data, size) != slot.index_hash) {
    throw Error(Status::Checksum, text(label, ": the index is damaged: its checksum is wrong"));
  }
  Index index;
  std::memcpy(&index.header, data, sizeof index.header);
  const IndexHeader& h = index.header;
  Cursor cursor(label, static_cast<const uint8_t*>(data) + sizeof h, size - sizeof h);
  cursor.take(index.tensors, h.tensors, "tensor");
  cursor.take(index.tasks, h.tasks, "task");
  cursor.take(index.entries, multiply(h.tensors, h.tasks), "entry");
  cursor.take(index.planes, h.planes, "plane");
  cursor.take(index.free, h.free, "free range");
  cursor.take(index.files, h.files, "file");
  cursor.take(index.metas, h.metas, "metadata");
  cursor.take(index.dims, h.dims, "dim");
  cursor.take(index.sums, h.sums, "sum");
  cursor.take(index.counts, h.counts, "count");
  if (h.strings > cursor.left()) fail(Status::Format, label, "the index is too short for its strings");
  index.strings.assign(reinterpret_cast<const char*>(cursor.data()), h.strings);
  uint64_t padding = cursor.left() - h.strings;
  if (padding >= kAlign || !all_zero(cursor.data() + h.strings, padding)) {
    fail(Status::Format, label, "invalid index: bytes are left behind its strings");
  }
  Validator(label, index, slot).run();
  return index;
}

}  // namespace tallcodec
