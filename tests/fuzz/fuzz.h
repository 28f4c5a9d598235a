// What the fuzz targets share. Each is a LLVMFuzzerTestOneInput: libFuzzer calls it with inputs it makes up,
// replay.cpp with those of files.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "dtype.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace tallcodec {

[[noreturn]] inline void broken(const char* file, int line, const char* what) {
  std::fprintf(stderr, "%s:%d: %s\n", file, line, what);
  std::abort();
}

#define EXPECT(condition) \
  if (!(condition)) tallcodec::broken(__FILE__, __LINE__, #condition)

// Choices, taken off the front of an input; 0 where it has ended.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), left_(size) {}

  template <class T>
  T take() {
    T value{};
    const size_t size = std::min(left_, sizeof value);
    if (size) std::memcpy(&value, data_, size);
    skip(size);
    return value;
  }
  uint32_t below(uint32_t n) { return n <= 256 ? take<uint8_t>() % n : take<uint32_t>() % n; }
  template <class T, size_t N>
  T one_of(const T (&list)[N]) {
    return list[below(N)];
  }
  // `size` bytes: what is left, over and over, slightly changed each time.
  std::vector<uint8_t> bytes(size_t size) {
    std::vector<uint8_t> out(size);
    uint8_t change = 0;
    for (size_t at = 0; left_ && at < size; at += left_, change = uint8_t(change + 89)) {
      const size_t part = std::min(left_, size - at);
      for (size_t i = 0; i < part; ++i) out[at + i] = uint8_t(data_[i] + change);
    }
    skip(std::min(left_, size));
    return out;
  }
  std::vector<uint8_t> rest() { return bytes(left_); }

 private:
  void skip(size_t size) {
    data_ += size;
    left_ -= size;
  }

  const uint8_t* data_;
  size_t left_;
};

// Memory that ends where it says: the sanitizer sees any step beyond. It begins `gap` bytes behind an aligned place.
class Buffer {
 public:
  explicit Buffer(size_t size, size_t gap = 0) : all_(new uint8_t[size + gap]), begin_(all_.get() + gap), size_(size) {
    std::fill(begin_, begin_ + size, uint8_t{0xa5});
  }
  explicit Buffer(const std::vector<uint8_t>& bytes, size_t gap = 0) : Buffer(bytes.size(), gap) {
    std::copy(bytes.begin(), bytes.end(), begin_);
  }
  uint8_t* data() const { return begin_; }
  size_t size() const { return size_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(begin_);
  }
  bool operator==(const Buffer& o) const {
    return size_ == o.size_ && std::equal(begin_, begin_ + size_, o.begin_);
  }

 private:
  std::unique_ptr<uint8_t[]> all_;
  uint8_t* begin_;
  size_t size_;
};

constexpr DType kFloats[] = {DType::F32, DType::F16, DType::BF16};
constexpr DType kShared[] = {DType::F32, DType::F16, DType::BF16, DType::I8};

}  // namespace tallcodec
