// The interpreter's lock, given up and taken, also when the interpreter ends meanwhile. Up to Python 3.13 a thread that
// wants the lock then is ended by pthread_exit, which unwinds its stack: out of a destructor, or into a loop's
// catch (...), that aborts the process. Here it waits for the end of the process instead, as from 3.14 on.
#pragma once
#include <pybind11/pybind11.h>
#include <unistd.h>

#include <exception>

namespace tallcodec {

[[noreturn]] inline void wait_for_the_end() {
  for (;;) ::pause();
}

// In place of pybind11::gil_scoped_release.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      wait_for_the_end();
    }
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* const state_;
};

// Calls body, in any thread, with the lock.
template <class Body>
void with_gil(Body body) {
  try {
    pybind11::gil_scoped_acquire gil;
    body();
  } catch (const std::exception&) {
    throw;
  } catch (...) {  // what unwinds a thread is none
    wait_for_the_end();
  }
}

}  // namespace tallcodec
