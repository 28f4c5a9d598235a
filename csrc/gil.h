// The interpreter's lock, given up and taken, also when the interpreter ends meanwhile. Up to Python 3.13 a thread that
// wants the lock then is ended by pthread_exit, which unwinds its stack: out of a destructor, or into a loop's
// catch (...), that aborts the process. Here it waits for the end of the process instead, as from 3.14 on.
#pragma once
#include <pthread.h>
#include <pybind11/pybind11.h>
#include <unistd.h>

#include <cstdint>
#include <exception>
#include <mutex>

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

// A thread that Python does not know yet, known to it as long as this is there. Python's list of its threads has a
// lock that a process which forks must not find taken: up to 3.11 the child would wait for it for ever. Threads of
// Python change the list with the interpreter's lock, which forking takes; one that is new to it cannot.
class KnownThread {
 public:
  KnownThread() : state_(create()) { PyEval_RestoreThread(state_); }
  ~KnownThread() {
    PyThreadState_Clear(state_);
    PyThreadState_DeleteCurrent();
  }
  KnownThread(const KnownThread&) = delete;
  KnownThread& operator=(const KnownThread&) = delete;

  // Once, when the extension is loaded.
  static void keep_from_forks() {
    ::pthread_atfork([] { creation().lock(); }, [] { creation().unlock(); }, [] { creation().unlock(); });
  }

 private:
  static PyThreadState* create() {
    const std::lock_guard<std::mutex> no_fork(creation());
    return PyThreadState_New(PyInterpreterState_Main());
  }
  static std::mutex& creation() {
    static std::mutex mutex;
    return mutex;
  }

  PyThreadState* const state_;
};

// Calls body, in any thread, with the lock.
template <class Body>
void with_gil(Body body) {
  or_wait_for_the_end([&] {
    if (PyGILState_GetThisThreadState()) {
      const pybind11::gil_scoped_acquire gil;
      body();
    } else {
      const KnownThread known;
      body();
    }
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
