// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cuda.h>

#include <cstdint>

#include "src/cuda/ptx/barrier.cuh"

// Hopper's asynchronous copies (sm_90) of bytes, and of boxes of tensors that a tensor map describes. One thread issues
// a copy. Source: PTX ISA 8.x, cp.async.bulk and cp.async.bulk.tensor.

namespace dsm::cuda {

/// What the L2 should do with the bytes: the encoded policies of createpolicy.fractional with fraction 1.
enum class L2Hint : std::uint64_t {
  kEvictNormal = 0x1000000000000000ull,
  kEvictFirst = 0x12f0000000000000ull,
};

/// Asks the L2 for a line of 128 bytes.
__device__ __forceinline__ void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p) : "memory");
}
__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

/// `bytes` from global memory; they and both addresses are multiples of 16.
__device__ __forceinline__ void bulk_load(std::uint32_t shared, const void* from, std::uint32_t bytes,
                                          MBarrier& landed) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
               "l"(from), "r"(bytes), "r"(landed.address())
               : "memory");
}
/// The same, with what the L2 should do.
__device__ __forceinline__ void bulk_load(std::uint32_t shared, const void* from, std::uint32_t bytes, MBarrier& landed,
                                          L2Hint hint) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(shared),
      "l"(from), "r"(bytes), "r"(landed.address()), "l"(static_cast<std::uint64_t>(hint))
      : "memory");
}
/// A box of a tensor at the given coordinates, fastest dimension first; what is outside the tensor becomes 0.
__device__ __forceinline__ void tensor_load(void* shared, const CUtensorMap& map, int c0, int c1, int c2, int c3,
                                            MBarrier& landed, L2Hint hint = L2Hint::kEvictNormal) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(landed.address()), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(static_cast<std::uint64_t>(hint))
      : "memory");
}
/// The same for the blocks of the cluster that `blocks` has bits of: to the same place in each one's shared memory,
/// counted by the barrier at the same place.
__device__ __forceinline__ void tensor_multicast(void* shared, const CUtensorMap& map, int c0, int c1, int c2, int c3,
                                                 MBarrier& landed, std::uint16_t blocks,
                                                 L2Hint hint = L2Hint::kEvictNormal) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6}], [%2], %7, %8;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(landed.address()), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"(blocks),
      "l"(static_cast<std::uint64_t>(hint))
      : "memory");
}

/// Asks the L2 for a box.
__device__ __forceinline__ void tensor_prefetch_l2(const CUtensorMap& map, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];" ::"l"(&map), "r"(c0), "r"(c1),
               "r"(c2), "r"(c3)
               : "memory");
}

/// Stores a box of a tensor from shared memory; what is outside the tensor is not stored. bulk_commit ends a group of
/// stores, and bulk_wait_read waits until the thread's groups have read their shared memory.
__device__ __forceinline__ void tensor_store(const CUtensorMap& map, const void* shared, int c0, int c1, int c2, int c3,
                                             L2Hint hint = L2Hint::kEvictNormal) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group.L2::cache_hint"
      " [%0, {%2, %3, %4, %5}], [%1], %6;" ::"l"(&map),
      "r"(shared_address(shared)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(static_cast<std::uint64_t>(hint))
      : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ __forceinline__ void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

}  // namespace dsm::cuda
