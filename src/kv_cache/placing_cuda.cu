// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/cuda/launch/launch.h"
#include "src/cuda/ptx/barrier.cuh"
#include "src/kv_cache/placing.cuh"

namespace dsm {
namespace {

constexpr int kThreads = 256;

/// What the workspace holds before is arbitrary: a mark counts if it is a token that names the row.
__global__ void __launch_bounds__(kThreads) mark_last_cuda_kernel(const std::int64_t* slots, std::int64_t tokens,
                                                                  std::int64_t rows, std::int32_t* last_tokens) {
  cuda::release_next_kernel();
  const std::int64_t token = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (token >= tokens) return;
  const std::int64_t slot = slots[token];
  if (slot < 0 || slot >= rows) return;
  const auto own = static_cast<std::int32_t>(token);
  std::int32_t* mark = last_tokens + slot;
  for (;;) {
    const std::int32_t before = atomicMax(mark, own);
    if (before <= own || (before < tokens && slots[before] == slot)) return;
    atomicCAS(mark, before, own);
  }
}

}  // namespace

Placing::Placing(const char* operation, const TensorView& slot_view, const TensorView& cache, const Launch& launch)
    : slots(slot_view.as<const std::int64_t>()), tokens(slot_view.numel()), last_tokens(nullptr) {
  if (tokens <= kMaxUnmarkedTokens) return;
  auto* marks = static_cast<std::int32_t*>(launch.workspace);
  const dim3 grid(static_cast<unsigned>(cuda::ceil_div<std::int64_t>(tokens, kThreads)));
  const std::int64_t rows = cache.size(0) * cache.size(1);
  cuda::launch(operation, mark_last_cuda_kernel, grid, dim3(kThreads), 0, launch, slots, tokens, rows, marks);
  last_tokens = marks;
}

}  // namespace dsm
