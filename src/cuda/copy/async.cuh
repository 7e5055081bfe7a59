// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

// The copies of sm_80 and newer from global to shared memory, in groups that the copying thread waits for, or with
// MBarrier::arrive_after_copies. They store as ordinary instructions do: before wgmma or bulk copies read the bytes,
// who waited for them calls fence_async_shared.

namespace dsm::cuda {

/// Begins to fill kBytes (16, 8 or 4, aligned to as much) in shared memory with so many `bytes` and zeros behind them.
/// With 0 bytes `from` is not read, but must be an address.
template <int kBytes>
__device__ __forceinline__ void copy_async(std::uint32_t to, const void* from, int bytes) {
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
                 "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
                 "n"(kBytes), "r"(bytes)
                 : "memory");
}

/// As above, of 16 bytes that hardly anybody else reads: the L2 gives them up before what others have written there.
__device__ __forceinline__ void copy_async_once(std::uint32_t to, const void* from, int bytes) {
  asm volatile(
      "{ .reg .b64 policy;\n"
      "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, policy; }" ::"r"(to),
      "l"(__cvta_generic_to_global(from)), "r"(bytes)
      : "memory");
}

/// Ends a group: the copies that this thread has begun since the last one.
__device__ __forceinline__ void end_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits for all groups of this thread but the `kLater` last ones.
template <int kLater>
__device__ __forceinline__ void await_copy_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");
}

}  // namespace dsm::cuda
