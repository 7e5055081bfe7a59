// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "dsm/export.h"

namespace dsm {

/// Calls `body(context, b, e)` over disjoint ranges that cover [begin, end), possibly on several threads.
using ParallelFor = void (*)(std::int64_t begin, std::int64_t end, std::int64_t grain,
                             void (*body)(void* context, std::int64_t b, std::int64_t e), void* context);

/// Replaces the library's own thread pool for CPU operators, e.g. by the host program's pool, so that two pools
/// do not fight over the cores. Null restores the own pool. Not thread-safe: call it before the first operator.
DSM_API void set_parallel_for(ParallelFor parallel_for);

/// Number of threads of the library's own pool (default: the hardware's). Results never depend on it.
DSM_API void set_num_threads(int threads);

}  // namespace dsm
