// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/core/parallel_for.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "dsm/parallel.h"

namespace dsm {
namespace {

struct Range {
  std::int64_t begin, end;
};

/// The ranges of one loop, in no particular order.
std::vector<Range> ranges_of(std::int64_t begin, std::int64_t end, std::int64_t grain) {
  std::mutex mutex;
  std::vector<Range> ranges;
  parallel_for(begin, end, grain, [&](std::int64_t b, std::int64_t e) {
    const std::lock_guard lock(mutex);
    ranges.push_back({b, e});
  });
  return ranges;
}

void expect_exact_cover(std::int64_t begin, std::int64_t end, const std::vector<Range>& ranges) {
  std::vector<int> visits(end - begin);
  for (const auto [b, e] : ranges) {
    ASSERT_LE(begin, b);
    ASSERT_LT(b, e);
    ASSERT_LE(e, end);
    for (std::int64_t i = b; i < e; ++i) ++visits[i - begin];
  }
  for (std::int64_t i = begin; i < end; ++i) ASSERT_EQ(visits[i - begin], 1) << "index " << i;
}

struct ParallelFor : testing::Test {
  void TearDown() override {
    set_host_threads({});
    set_num_threads(0);
  }
};

TEST_F(ParallelFor, VisitsEveryIndexOnceInRangesNoFinerThanTheGrain) {
  for (int threads : {1, 2, 3, 8}) {
    set_num_threads(threads);
    for (std::int64_t begin : {0, -5, 1000000000}) {
      for (std::int64_t count : {1, 2, 7, 64, 1000}) {
        for (std::int64_t grain : {0, 1, 3, 64, 5000}) {
          SCOPED_TRACE(testing::Message() << threads << " threads, " << count << " from " << begin << " by " << grain);
          const std::vector<Range> ranges = ranges_of(begin, begin + count, grain);
          expect_exact_cover(begin, begin + count, ranges);
          for (const auto [b, e] : ranges) EXPECT_TRUE(e - b >= grain || e == begin + count);
        }
      }
    }
  }
}

TEST_F(ParallelFor, EmptyAndInvertedRangesCallNothing) {
  EXPECT_TRUE(ranges_of(3, 3, 1).empty());
  EXPECT_TRUE(ranges_of(3, -3, 1).empty());
}

TEST_F(ParallelFor, TwoThreadsWorkAtTheSameTime) {
  set_num_threads(2);
  std::mutex mutex;
  std::condition_variable arrival;
  int present = 0;
  std::atomic<int> met = 0;
  parallel_for(0, 2, 1, [&](std::int64_t, std::int64_t) {
    std::unique_lock lock(mutex);
    ++present;
    arrival.notify_all();
    met += arrival.wait_for(lock, std::chrono::seconds(30), [&] { return present == 2; });
  });
  EXPECT_EQ(met, 2);
}

TEST_F(ParallelFor, NestedLoopsRunInTheirCaller) {
  set_num_threads(3);
  std::atomic<int> calls = 0, strangers = 0;
  parallel_for(0, 24, 1, [&](std::int64_t b, std::int64_t e) {
    const auto outer = std::this_thread::get_id();
    for (std::int64_t i = b; i < e; ++i) {
      parallel_for(0, 100, 1, [&](std::int64_t nested_b, std::int64_t nested_e) {
        calls += nested_b == 0 && nested_e == 100;
        strangers += std::this_thread::get_id() != outer;
      });
    }
  });
  EXPECT_EQ(calls, 24);
  EXPECT_EQ(strangers, 0);
  // The mark of being inside has been taken back: the next loop is cut up again.
  EXPECT_GT(ranges_of(0, 100, 1).size(), 1u);
}

TEST_F(ParallelFor, ConcurrentCallersEachGetTheirOwnLoop) {
  set_num_threads(2);
  std::vector<std::thread> callers;
  std::atomic<std::int64_t> total = 0;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int loop = 0; loop < 200; ++loop)
        parallel_for(0, 50, 1, [&](std::int64_t b, std::int64_t e) { total += e - b; });
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(total, 4 * 200 * 50);
}

TEST_F(ParallelFor, ThrowsWhatABodyThrowsOnceAllHaveStopped) {
  for (int threads : {1, 2, 4}) {
    set_num_threads(threads);
    std::atomic<int> running = 0;
    const auto loop = [&] {
      parallel_for(0, 1000, 1, [&](std::int64_t, std::int64_t e) {
        ++running;
        if (e > 300) {
          --running;
          throw std::bad_alloc();
        }
        --running;
      });
    };
    EXPECT_THROW(loop(), std::bad_alloc);
    EXPECT_EQ(running, 0);
    expect_exact_cover(0, 100, ranges_of(0, 100, 1));  // and the pool works on
  }
}

// A host program's pool of which each call really runs on a thread of its own.
std::atomic<int> host_threads, host_runs;
int count_host_threads() { return host_threads; }
void run_on_host(int count, void (*body)(void*), void* context) {
  ++host_runs;
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(body, context);
  for (std::thread& thread : threads) thread.join();
}

TEST_F(ParallelFor, RunsOnTheHostProgramsThreads) {
  set_host_threads({count_host_threads, run_on_host});
  for (int threads : {1, 2, 5}) {
    host_threads = threads;
    host_runs = 0;
    expect_exact_cover(0, 1000, ranges_of(0, 1000, 1));
    EXPECT_EQ(host_runs, threads > 1 ? 1 : 0);
  }
  host_runs = 0;
  EXPECT_EQ(ranges_of(0, 8, 8).size(), 1u);
  EXPECT_EQ(host_runs, 0) << "one range needs no other thread";
  host_threads = 3;
  EXPECT_THROW(parallel_for(0, 1000, 1, [](std::int64_t, std::int64_t) { throw std::bad_alloc(); }), std::bad_alloc);
}

}  // namespace
}  // namespace dsm
