// Header and index as bytes.
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "format.h"
#include "kernels.h"
#include "text.h"

namespace tallcodec {
namespace {

template <class T>
void append(std::string& out, const std::vector<T>& records) {
  if (!records.empty()) {
    out.append(reinterpret_cast<const char*>(records.data()), records.size() * sizeof(T));
  }
}

}  // namespace

void write_all(int fd, const std::string& label, const void* data, uint64_t size, uint64_t offset) {
  for (uint64_t done = 0; done < size;) {
    ssize_t put = ::pwrite(fd, static_cast<const uint8_t*>(data) + done, size - done,
                           static_cast<off_t>(offset + done));
    if (put >= 0) {
      done += static_cast<uint64_t>(put);
    } else if (errno != EINTR) {
      throw Error(Status::Write, text(label, ": cannot write: ", std::strerror(errno)), errno);
    }
  }
}

std::string write_index(Index& index) {
  IndexHeader& h = index.header;
  h.tensors = static_cast<uint32_t>(index.tensors.size());
  h.tasks = static_cast<uint32_t>(index.tasks.size());
  h.planes = static_cast<uint32_t>(index.planes.size());
  h.free = static_cast<uint32_t>(index.free.size());
  h.files = static_cast<uint32_t>(index.files.size());
  h.metas = static_cast<uint32_t>(index.metas.size());
  h.dims = index.dims.size();
  h.sums = index.sums.size();
  h.counts = index.counts.size();
  h.strings = index.strings.size();

  std::string out(reinterpret_cast<const char*>(&h), sizeof h);
  append(out, index.tensors);
  append(out, index.tasks);
  append(out, index.entries);
  append(out, index.planes);
  append(out, index.free);
  append(out, index.files);
  append(out, index.metas);
  append(out, index.dims);
  append(out, index.sums);
  append(out, index.counts);
  out += index.strings;
  out.resize(align64(out.size()), '\0');
  return out;
}

uint64_t hash_block(const Kernels& kernels, const uint8_t* bytes, uint64_t size) {
  if (size % kAlign == 0) return kernels.hash(bytes, size);
  std::vector<uint8_t> padded(align64(size));
  std::memcpy(padded.data(), bytes, size);
  return kernels.hash(padded.data(), padded.size());
}

uint64_t hash_slot(const Header& header, const Slot& slot) {
  uint8_t bytes[128] = {};
  std::memcpy(bytes, &header, 64);
  std::memcpy(bytes + 64, &slot, offsetof(Slot, slot_hash));
  // 120 bytes count; the hash extends them with zeros, so the last 8 may be among these.
  return find_kernels("scalar")->hash(bytes, sizeof bytes);
}

bool is_right(const Header& header, const Slot& slot) {
  return slot.sequence != 0 && slot.slot_hash == hash_slot(header, slot);
}

Slot make_slot(const Header& header, uint64_t sequence, uint64_t index_offset, std::string_view index,
               uint64_t file_size) {
  Slot slot{};
  slot.sequence = sequence;
  slot.index_offset = index_offset;
  slot.index_size = index.size();
  slot.index_hash = find_kernels("scalar")->hash(index.data(), index.size());
  slot.file_size = file_size;
  slot.slot_hash = hash_slot(header, slot);
  return slot;
}

Header write_header(uint64_t index_offset, std::string_view index, uint64_t file_size) {
  Header header{};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  header.version = kVersion;
  header.header_size = sizeof header;
  header.slot[0] = make_slot(header, 1, index_offset, index, file_size);
  return header;
}

}  // namespace tallcodec
