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

namespace tallcodec {

// Calls body(item, worker) for every item below `count`; worker < threads. Items start in ascending
// order. The calling thread is worker 0 and calls poll, if there is one, before each of its items. The
// first exception, from a body or from poll, stops the loop and is thrown once all threads are done.
template <class Body>
void parallel_for(uint64_t count, unsigned threads, const std::function<void()>& poll, Body body) {
  std::atomic<uint64_t> next{0};
  std::exception_ptr failure;
  std::mutex failing;

  auto work = [&](unsigned worker) {
    try {
      for (uint64_t item; (item = next.fetch_add(1)) < count;) {
        if (worker == 0 && poll) poll();
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
}

}  // namespace tallcodec
