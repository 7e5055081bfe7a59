// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <type_traits>

namespace dsm {

namespace detail {
void parallel_for(std::int64_t begin, std::int64_t end, std::int64_t grain,
                  void (*body)(void*, std::int64_t, std::int64_t), void* context);
}

/// Threads that a parallel_for begun here would run on: 1 inside of one. May choose how work is cut, but never results.
int num_threads();

/// Calls `body(b, e)` over disjoint ranges that cover [begin, end) on the CPU threads; a range is cut no finer than
/// `grain`. The body must write each output from one range only: then the bits do not depend on the number of threads.
/// What a body throws (std::bad_alloc, say) is thrown again here, once every thread has stopped; of several the first.
/// A nested call runs in the calling thread.
template <class Body>
void parallel_for(std::int64_t begin, std::int64_t end, std::int64_t grain, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  detail::parallel_for(
      begin, end, grain, [](void* context, std::int64_t b, std::int64_t e) { (*static_cast<Plain*>(context))(b, e); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace dsm
