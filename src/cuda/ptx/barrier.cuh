// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

// Barriers and the ordering of Hopper's asynchronous units (sm_90); named barriers, and MBarrier within a block and
// without bytes of copies, from sm_80 on. Source: PTX ISA 8.x, sections on mbarrier, barrier, fence, griddepcontrol and
// setmaxnreg.

namespace dsm::cuda {

__device__ __forceinline__ std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

/// A barrier in shared memory that counts arrivals of threads and bytes of asynchronous copies. Phases are told apart
/// by their parity: the n-th phase (from 0) has parity n % 2, and a wait for the parity of the phase before the first
/// returns at once.
class MBarrier {
 public:
  /// By one thread; then `fence_barrier_init` and a barrier of the block (or cluster) before others use it.
  __device__ void init(std::uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(arrivals) : "memory");
  }
  __device__ void arrive() { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address()) : "memory"); }
  /// Arrives, and has the phase wait for so many bytes of copies besides.
  __device__ void arrive_expecting(std::uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
  }
  /// Arrives when all cp.async of this thread so far have landed; the arrival is one of those that init counted.
  __device__ void arrive_after_copies() {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(address()) : "memory");
  }
  /// Arrives at the barrier at the same place in another block of the cluster.
  __device__ void arrive_at(std::uint32_t block_of_cluster) {
    asm volatile(
        "{ .reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(address()),
        "r"(block_of_cluster)
        : "memory");
  }
  __device__ bool try_wait(std::uint32_t parity) {
    std::uint32_t done;
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{ .reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(address()), "r"(parity)
        : "memory");
#else
    asm volatile(
        "{ .reg .pred p;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(address()), "r"(parity)
        : "memory");
#endif
    return done;
  }
  __device__ void wait(std::uint32_t parity) {
    while (!try_wait(parity)) {
    }
  }
  __device__ std::uint32_t address() const { return shared_address(&state_); }

 private:
  std::uint64_t state_;
};

__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/// Ordinary stores to shared memory before it are seen by wgmma and bulk copies after it (and after a barrier).
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// Whether this lane is the one of its warp, all of whose lanes call it, that does what one has to do. The compiler
/// knows that it is one, and leaves out a loop over the lanes where an instruction takes its operands from a warp.
__device__ __forceinline__ bool elected() {
  std::uint32_t is;
  asm volatile(
      "{ .reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, p; }"
      : "=r"(is));
  return is;
}

/// Named barriers, 1 to 15, among `threads` threads, a multiple of 32: some only arrive. 0 is that of __syncthreads,
/// for all threads of the block from wherever they are.
__device__ __forceinline__ void named_sync(int barrier, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
/// As named_sync; whether the predicate holds for any of the threads.
__device__ __forceinline__ bool named_sync_or(int barrier, int threads, bool predicate) {
  int any;
  asm volatile(
      "{ .reg .pred own, any;\n"
      "setp.ne.b32 own, %3, 0;\n"
      "barrier.red.or.pred any, %1, %2, own;\n"
      "selp.b32 %0, 1, 0, any; }"
      : "=r"(any)
      : "r"(barrier), "r"(threads), "r"(static_cast<int>(predicate))
      : "memory");
  return any;
}
__device__ __forceinline__ void named_arrive(int barrier, int threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

/// Registers a thread may use from here on, a multiple of 8; all warps of the warpgroup.
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

/// Programmatic dependent launch: wait until the kernel before has let its results be seen; let the next one start.
/// Code for older devices has neither, so that its kernels must not overlap (launch_dependent).
__device__ __forceinline__ void await_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void release_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace dsm::cuda
