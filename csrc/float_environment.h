// Default floating point for the life of an object: round to nearest even, denormals kept. The
// application may have asked for flush-to-zero; a kernel's bits must not depend on it, nor may the
// application notice.
//
// The compiler may move arithmetic past the constructor within one function: construct it in a
// function that leaves the arithmetic to another, which is not inlined.
#pragma once
#include <cstdint>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace tallcodec {

class FloatEnvironment {
 public:
  FloatEnvironment() : found_(get()) { set(kDefault); }
  ~FloatEnvironment() { set(found_); }
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;

 private:
#if defined(__SSE2__)
  using Word = unsigned;
  static constexpr Word kDefault = 0x1f80;
  static Word get() { return _mm_getcsr(); }
  static void set(Word word) { _mm_setcsr(word); }
#elif defined(__aarch64__)
  using Word = uint64_t;
  static constexpr Word kDefault = 0;
  static Word get() {
    Word word;
    __asm__ volatile("mrs %0, fpcr" : "=r"(word));
    return word;
  }
  static void set(Word word) { __asm__ volatile("msr fpcr, %0" : : "r"(word)); }
#else
  using Word = int;
  static constexpr Word kDefault = 0;
  static Word get() { return 0; }
  static void set(Word) {}
#endif

  const Word found_;
};

}  // namespace tallcodec
