// A loop over independent items on several threads.
#pragma once
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "tallcodec.h"

namespace tallcodec {

// Who is told how far a loop is, in items, by its calling thread; may throw.
using Watch = std::function<void(uint64_t done, uint64_t count)>;

// Calls body(item, worker) for every item below `count`; worker < threads. Items start in ascending
// order. The calling thread is worker 0 and calls watch, if there is one, before each of its items and at the
// end. The first exception, from a body or from watch, stops the loop and is thrown once all threads are done.
template <class Body>
void parallel_for(uint64_t count, unsigned threads, const Watch& watch, Body body) {
  std::atomic<uint64_t> next{0};
  std::exception_ptr failure;
  std::mutex failing;

  auto work = [&](unsigned worker) {
    try {
      for (;;) {
        // Before it has an item: nobody is to wait for one that is held up here.
        if (worker == 0 && watch && next < count) watch(next, count);
        const uint64_t item = next.fetch_add(1);
        if (item >= count) break;
        body(item, worker);
      }
    } catch (...) {
      next = count;
      std::lock_guard lock(failing);
      if (!failure) failure = std::current_exception();
    }
  };

  std::vector<std::thread> others;
  if (threads > count) threads = static_cast<unsigned>(count);
  others.reserve(threads);
  try {
    for (unsigned worker = 1; worker < threads; ++worker) others.emplace_back(work, worker);
  } catch (const std::system_error&) {
    // No more threads to be had: those that run do the work.
  }
  work(0);
  for (auto& thread : others) thread.join();
  if (failure) std::rethrow_exception(failure);
  if (watch && count) watch(count, count);
}

// The watch that calls options.poll, if there is one, for a loop that does `step`.
inline Watch watch(const Options& options, const char* step) {
  if (!options.poll) return nullptr;
  return [&poll = options.poll, step](uint64_t done, uint64_t count) { poll(step, done, count); };
}

}  // namespace tallcodec
