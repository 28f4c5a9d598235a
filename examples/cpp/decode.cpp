// A task's tensor out of a .tall file, without Python:
//
//   decode FILE                    the file's tasks and tensors
//   decode FILE TASK TENSOR        the tensor's bytes, on standard output ("" is the base)
//
// The file is read with pread, and of it only the ranges that the tensor needs; a server would fetch them from
// wherever the file is, or map it. Planes that are zstd frames need a decompressor: Options::inflate.
#include <fcntl.h>
#include <sys/stat.h>
#include <tallcodec.h>
#include <unistd.h>

#include <cstdio>
#include <deque>
#include <vector>

namespace {

// Ranges of a file, kept for as long as the reader.
class Ranges {
 public:
  explicit Ranges(const char* path) : fd_(::open(path, O_RDONLY)) {
    struct stat found;
    if (fd_ < 0 || ::fstat(fd_, &found) != 0) {
      throw tallcodec::Error(tallcodec::Status::Read, std::string(path) + ": cannot be opened");
    }
    size_ = static_cast<uint64_t>(found.st_size);
  }
  ~Ranges() { ::close(fd_); }
  Ranges(const Ranges&) = delete;
  Ranges& operator=(const Ranges&) = delete;

  uint64_t size() const { return size_; }
  const uint8_t* fetch(uint64_t offset, uint64_t size) {
    std::vector<uint8_t>& bytes = held_.emplace_back(size);
    for (uint64_t done = 0; done < size;) {
      const ssize_t got = ::pread(fd_, bytes.data() + done, size - done, static_cast<off_t>(offset + done));
      if (got <= 0) throw tallcodec::Error(tallcodec::Status::Read, "the file ends early");
      done += static_cast<uint64_t>(got);
    }
    return bytes.data();
  }

 private:
  int fd_;
  uint64_t size_;
  std::deque<std::vector<uint8_t>> held_;
};

void list(const tallcodec::File& file) {
  for (const std::string& task : file.tasks()) std::printf("task %s\n", task.c_str());
  for (const std::string& tensor : file.tensors()) std::printf("tensor %s\n", tensor.c_str());
}

void decode(const tallcodec::File& file, const std::string& task_name, const std::string& tensor_name) {
  const uint32_t task = task_name.empty() ? tallcodec::kNone : file.find_task(task_name);
  const uint32_t tensor = file.find_tensor(tensor_name);
  std::vector<uint8_t> out(file.info(task, tensor).nbytes);
  uint64_t bytes = 0;
  for (const tallcodec::Range& range : file.ranges(task, tensor)) bytes += range.size;
  std::fprintf(stderr, "%zu bytes from %llu of the file\n", out.size(), static_cast<unsigned long long>(bytes));
  file.decode({{task, tensor, out.data()}}, {});
  std::fwrite(out.data(), 1, out.size(), stdout);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2 && count != 4) {
    std::fprintf(stderr, "usage: decode FILE [TASK TENSOR]\n");
    return 2;
  }
  try {
    Ranges ranges(arguments[1]);
    const tallcodec::File file(arguments[1], ranges.size(), [&](uint64_t offset, uint64_t size) {
      return ranges.fetch(offset, size);
    });
    if (count == 2) {
      list(file);
    } else {
      decode(file, arguments[2], arguments[3]);
    }
  } catch (const tallcodec::Error& e) {
    std::fprintf(stderr, "decode: %s\n", e.what());
    return 1;
  }
}
