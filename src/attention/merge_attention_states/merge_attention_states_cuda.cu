// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
// Bound by memory: outputs are read once, 16 bytes a thread, with those of several parts in flight. Up to a warp shares
// a row, and every thread of it weighs the parts anew, which are few numbers. H200, part of the same run's copy
// bandwidth, bfloat16 | float32: 2 parts of 65536 rows of 512: 57 | 77 %, 32 parts of 2048 rows: 63 | 77 %.
#include <cstdint>

#include "src/attention/merge_attention_states/merge_attention_states.h"
#include "src/cpu/visit_dtype.h"
#include "src/cuda/copy/pack.cuh"
#include "src/cuda/launch/launch.h"
#include "src/cuda/reduce/warp.cuh"
#include "src/numerics/softmax_merge.h"

namespace dsm {
namespace {

using cuda::Pack;

constexpr int kThreads = 128;
constexpr int kHeld = 2;    // packs of a row that a thread sums up at the same time
constexpr int kAtOnce = 4;  // parts whose packs are in flight

/// Strided tensors, with the parts apart.
template <class T>
struct Parts {
  const T* data;
  std::int64_t part, batch, s_q, h_q;  ///< strides

  __device__ const T* at(std::int64_t b, std::int64_t i, std::int64_t h) const {
    return data + b * batch + i * s_q + h * h_q;
  }
};

template <class T, int W>
__global__ void __launch_bounds__(kThreads, 5)
    merge_attention_states_cuda_kernel(Parts<T> outs, Parts<Compute<T>> lses, const Compute<T>* attn_sink,
                                       std::int64_t parts, std::int64_t rows, std::int64_t s_q, std::int64_t h_q,
                                       std::int64_t d_v, T* out, Compute<T>* out_lse) {
  using A = Compute<T>;
  const std::int64_t row = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  const std::int64_t query = row / h_q, h = row - query * h_q, b = query / s_q, i = query - b * s_q;
  const A* row_lses = lses.at(b, i, h);
  const auto lse_of = [&](std::int64_t part) {
    const A lse = row_lses[part * lses.part];
    return lse == kInfinity<A> ? -kInfinity<A> : lse;  // both signs say that there is no key
  };
  SoftmaxState<A> state;
  for (std::int64_t part = 0; part < parts; ++part) state = merge(state, SoftmaxState<A>{lse_of(part), A(1)});
  // The sink joins under the common maximum: neither e^lse nor e^sink may overflow.
  const SoftmaxState<A> all = attn_sink ? merge(state, {attn_sink[h], A(1)}) : state;
  if (threadIdx.x == 0) out_lse[(b * h_q + h) * s_q + i] = state.l == A(0) ? kInfinity<A> : lse(state);

  const std::int64_t step = std::int64_t{blockDim.x} * W;
  for (std::int64_t column = threadIdx.x * W; column < d_v; column += kHeld * step) {
    A sums[kHeld][W] = {};
    for (std::int64_t begin = 0; begin < parts; begin += kAtOnce) {
      Pack<T, W> packs[kAtOnce][kHeld];
      A part_lse[kAtOnce];
#pragma unroll
      for (int p = 0; p < kAtOnce; ++p) part_lse[p] = begin + p < parts ? lse_of(begin + p) : -kInfinity<A>;
#pragma unroll
      for (int p = 0; p < kAtOnce; ++p) {
        if (part_lse[p] == -kInfinity<A>) continue;
#pragma unroll
        for (int k = 0; k < kHeld; ++k)  // behind the row's end its last pack again, in vain
          packs[p][k] =
              cuda::load_pack<W>(outs.at(b, i, h) + (begin + p) * outs.part + min(column + k * step, d_v - W));
      }
#pragma unroll
      for (int p = 0; p < kAtOnce; ++p) {
        if (part_lse[p] == -kInfinity<A>) continue;
        const A weight = exp_below_max(part_lse[p], all.m) / all.l;
#pragma unroll
        for (int k = 0; k < kHeld; ++k) {
          cuda::use_from_here(packs[p][k]);
#pragma unroll
          for (int j = 0; j < W; ++j) sums[k][j] += weight * cuda::widened(packs[p][k].at[j]);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kHeld; ++k)
      if (column + k * step < d_v) cuda::store_narrowed(out + row * d_v + column + k * step, sums[k]);
  }
}

template <class T, int W>
void launch_merge(const MergeAttentionStatesArgs& a, const Launch& launch) {
  using A = Compute<T>;
  const auto &o = a.outs.stride, &l = a.lses.stride;
  const std::int64_t d_v = a.outs.size(4), rows = a.lse.numel();
  unsigned x = 1;
  while (x < cuda::kWarpSize && x * W * kHeld < d_v) x *= 2;
  const dim3 block(x, kThreads / x);
  cuda::launch("merge_attention_states", merge_attention_states_cuda_kernel<T, W>,
               dim3(cuda::ceil_div<std::int64_t>(rows, block.y)), block, 0, launch,
               Parts<T>{a.outs.as<const T>(), o[0], o[1], o[2], o[3]},
               Parts<A>{a.lses.as<const A>(), l[0], l[1], l[3], l[2]}, a.attn_sink.as<const A>(), a.outs.size(0), rows,
               a.outs.size(2), a.outs.size(3), d_v, a.out.as<T>(), a.lse.as<A>());
}

}  // namespace

void merge_attention_states_cuda(const MergeAttentionStatesArgs& args, const Launch& launch) {
  cpu::visit_floating(args.outs.dtype, [&]<class T>() {
    constexpr int kPack = cuda::kPackSize<T>;
    const bool packs = cuda::packable({args.outs, args.out}) && args.outs.size(4) % kPack == 0;
    packs ? launch_merge<T, kPack>(args, launch) : launch_merge<T, 1>(args, launch);
  });
}

}  // namespace dsm
