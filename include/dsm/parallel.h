// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/export.h"

namespace dsm {

/// The host program's threads, for the CPU operators to run on.
struct HostThreads {
  /// How many threads there are now.
  int (*count)();
  /// Calls `body(context)` `count` times, on as many threads as there are, and returns when all calls have.
  void (*run)(int count, void (*body)(void* context), void* context);
};

/// Makes CPU operators run on the host program's threads instead of the library's own pool, so that two pools do not
/// fight over the cores. Call it before the first operator.
DSM_API void set_host_threads(const HostThreads& threads);

/// Number of threads of the library's own pool (default: the hardware's). Results never depend on it. Must not be
/// called while an operator runs.
DSM_API void set_num_threads(int threads);

}  // namespace dsm
