// Bytes from memory or from a file descriptor.
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "tallcodec.h"
#include "text.h"

namespace tallcodec {
namespace {

// The path behind a descriptor, for messages: a Source is not told it.
std::string file_name(int fd) {
  char path[4096];
  ssize_t n = ::readlink(text("/proc/self/fd/", fd).c_str(), path, sizeof path);
  return n > 0 ? std::string(path, static_cast<size_t>(n)) : text("file descriptor ", fd);
}

}  // namespace

const uint8_t* Source::view(uint64_t position, uint64_t size, std::vector<uint8_t>& buffer) const {
  if (memory) return memory + position;
  if (buffer.size() < size) buffer.resize(size);
  for (uint64_t done = 0; done < size;) {
    ssize_t got = ::pread(fd, buffer.data() + done, size - done,
                          static_cast<off_t>(offset + position + done));
    if (got > 0) {
      done += static_cast<uint64_t>(got);
    } else if (got == 0) {
      throw Error(Status::Read, text(file_name(fd), " ends early; was it changed while being read?"));
    } else if (errno != EINTR) {
      int error = errno;
      throw Error(Status::Read, text(file_name(fd), " cannot be read: ", std::strerror(error)), error);
    }
  }
  return buffer.data();
}

bool same_bytes(const Source& a, const Source& b, uint64_t size) {
  if (a.memory == b.memory && a.fd == b.fd && a.offset == b.offset) return true;
  std::vector<uint8_t> buffer_a, buffer_b;
  // Tensors that differ mostly do so at once, so the first look is short.
  uint64_t step = 4096;
  for (uint64_t at = 0; at < size;) {
    uint64_t part = std::min(step, size - at);
    if (std::memcmp(a.view(at, part, buffer_a), b.view(at, part, buffer_b), part) != 0) return false;
    at += part;
    step = 1 << 20;
  }
  return true;
}

}  // namespace tallcodec
