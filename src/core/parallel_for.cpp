// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/core/parallel_for.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "dsm/parallel.h"

namespace dsm {
namespace {

thread_local bool inside_parallel_for = false;

/// One loop whose ranges the threads take until none is left, or until a body throws.
struct Loop {
  std::atomic<std::int64_t> next;
  std::int64_t end, step;
  void (*body)(void*, std::int64_t, std::int64_t);
  void* context;
  std::atomic<bool> failed = false;
  std::exception_ptr failure = nullptr;  ///< the first; read when all threads are done

  void take_ranges() {
    inside_parallel_for = true;
    try {
      for (std::int64_t b; !failed && (b = next.fetch_add(step)) < end;) body(context, b, std::min(b + step, end));
    } catch (...) {
      if (!failed.exchange(true)) failure = std::current_exception();
    }
    inside_parallel_for = false;
  }
};

/// Threads that work on one loop at a time together with the caller. Concurrent callers queue.
class ThreadPool {
 public:
  explicit ThreadPool(int threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
  }

  ~ThreadPool() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  void run(Loop& loop) {
    const std::lock_guard one_caller(caller_mutex_);
    {
      const std::lock_guard lock(mutex_);
      loop_ = &loop;
      busy_ = static_cast<int>(workers_.size());
      ++generation_;
    }
    wake_.notify_all();
    loop.take_ranges();
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void work() {
    for (std::uint64_t seen = 0;;) {
      Loop* loop;
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return stopping_ || generation_ != seen; });
        if (stopping_) return;
        seen = generation_;
        loop = loop_;
      }
      loop->take_ranges();
      const std::lock_guard lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::vector<std::thread> workers_;
  std::mutex caller_mutex_, mutex_;
  std::condition_variable wake_, done_;
  Loop* loop_ = nullptr;
  int busy_ = 0;
  std::uint64_t generation_ = 0;
  bool stopping_ = false;
};

HostThreads host{nullptr, nullptr};
int wanted_threads = 0;

ThreadPool& own_pool() {
  static std::mutex mutex;
  // Never destroyed at exit: joining threads while a library is being unloaded deadlocks.
  static ThreadPool* pool = nullptr;
  const std::lock_guard lock(mutex);
  const int hardware = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  const int threads = wanted_threads > 0 ? wanted_threads : hardware;
  if (!pool || pool->threads() != threads) {
    delete pool;
    pool = new ThreadPool(threads);
  }
  return *pool;
}

}  // namespace

void set_host_threads(const HostThreads& threads) { host = threads; }

void set_num_threads(int threads) { wanted_threads = threads; }

int num_threads() {
  if (inside_parallel_for) return 1;
  return host.count ? host.count() : own_pool().threads();
}

namespace detail {

void parallel_for(std::int64_t begin, std::int64_t end, std::int64_t grain,
                  void (*body)(void*, std::int64_t, std::int64_t), void* context) {
  if (begin >= end) return;
  grain = std::max<std::int64_t>(grain, 1);
  if (end - begin <= grain) return body(context, begin, end);
  const int threads = num_threads();
  if (threads <= 1) return body(context, begin, end);
  // About eight ranges a thread: coarse enough to be cheap, fine enough to level uneven work such as causal rows.
  const std::int64_t even = (end - begin + 8 * threads - 1) / (8 * threads);
  Loop loop{begin, end, std::max(grain, even), body, context};
  if (host.count)
    host.run(threads, [](void* shared) { static_cast<Loop*>(shared)->take_ranges(); }, &loop);
  else
    own_pool().run(loop);
  if (loop.failure) std::rethrow_exception(loop.failure);
}

}  // namespace detail
}  // namespace dsm
