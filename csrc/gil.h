// The interpreter's lock, given up and taken, also when the interpreter ends meanwhile. Up to Python 3.13 a thread that
// wants the lock then is ended by pthread_exit, which unwinds its stack: out of a destructor, or into a loop's
// catch (...), that aborts the process. Here it waits for the end of the process instead, as from 3.14 on.
#pragma once
#include <pybind11/pybind11.h>
#include <unistd.h>

#include <cstdint>
#include <exception>

namespace tallcodec {

// Runs what may take the lock.
template <class Body>
void or_wait_for_the_end(Body body) {
  try {
    body();
  } catch (const std::exception&) {
    throw;
  } catch (...) {  // what unwinds a thread is no exception
    for (;;) ::pause();
  }
}

// In place of pybind11::gil_scoped_release.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() {
    or_wait_for_the_end([&] { PyEval_RestoreThread(state_); });
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* const state_;
};

// Calls body, in any thread, with the lock.
template <class Body>
void with_gil(Body body) {
  or_wait_for_the_end([&] {
    pybind11::gil_scoped_acquire gil;
    body();
  });
}

// The memory of an object with the buffer interface, which is kept. In place of pybind11::buffer_info: to let go of a
// mapping takes the lock.
class Buffer {
 public:
  explicit Buffer(const pybind11::buffer& from) {
    if (PyObject_GetBuffer(from.ptr(), &view_, PyBUF_SIMPLE) != 0) throw pybind11::error_already_set();
  }
  ~Buffer() {
    or_wait_for_the_end([&] { PyBuffer_Release(&view_); });
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  const uint8_t* data() const { return static_cast<const uint8_t*>(view_.buf); }
  uint64_t size() const { return static_cast<uint64_t>(view_.len); }

 private:
  Py_buffer view_;
};

}  // namespace tallcodec
