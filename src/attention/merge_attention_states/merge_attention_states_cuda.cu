// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
// Bound by memory: outputs are read once, 16 bytes a thread, with several of several parts in flight; those of the
// first parts are on their way before their weights are known. Up to a warp shares a row; its threads share the
// weighing of the parts, and are as many whatever the addresses, so that the sums are the same bits. H200, part of the
// same run's copy bandwidth, bfloat16 | float32: 2 parts of 131072 rows of 512: 91 | 102 %, 32 parts of 4096 rows: 86 |
// 87 %.
#include <cstdint>
#include <type_traits>

#include "src/attention/merge_attention_states/merge_attention_states.h"
#include "src/cpu/visit_dtype.h"
#include "src/cuda/copy/pack.cuh"
#include "src/cuda/index/divider.cuh"
#include "src/cuda/launch/launch.h"
#include "src/cuda/reduce/warp.cuh"
#include "src/numerics/softmax_merge.h"

namespace dsm {
namespace {

using cuda::Pack;

constexpr int kThreads = 128;
constexpr int kHeld = 4;    // packs of a row that a thread sums up at the same time
constexpr int kAtOnce = 2;  // parts whose packs are in flight

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
__device__ __forceinline__ void widen(const Pack<T, W>& pack, Compute<T> (&to)[W]) {
  if constexpr (std::is_same_v<T, bfloat16> && W > 1) {  // in words, which the compiler would take apart
    const auto words = __builtin_bit_cast(Pack<std::uint32_t, W / 2>, pack);
#pragma unroll
    for (int i = 0; i < W; i += 2) {
      to[i] = __uint_as_float(words.at[i / 2] << 16);
      to[i + 1] = __uint_as_float(words.at[i / 2] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < W; ++i) to[i] = cuda::widened(pack.at[i]);
  }
}

template <class T, int W>
__global__ void __launch_bounds__(kThreads, 4)
    merge_attention_states_cuda_kernel(Parts<T> outs, Parts<Compute<T>> lses, const Compute<T>* attn_sink, int parts,
                                       std::int64_t rows, cuda::Divider s_q, cuda::Divider h_q, int d_v, T* out,
                                       Compute<T>* out_lse) {
  using A = Compute<T>;
  const std::int64_t own_row = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y, row = min(own_row, rows - 1);
  const std::int64_t query = h_q.quotient_of_any(row), h = row - query * h_q.divisor();
  const std::int64_t b = s_q.quotient_of_any(query), i = query - b * s_q.divisor();
  const A* row_lses = lses.at(b, i, h);
  const T* row_outs = outs.at(b, i, h);
  // A thread of the row looks at one part in blockDim.x.
  const int lanes = blockDim.x, lane = threadIdx.x;
  const auto read_lse = [&](int part) {
    const A lse = part < parts ? row_lses[part * lses.part] : -kInfinity<A>;
    return lse == kInfinity<A> ? -kInfinity<A> : lse;  // both signs say that there is no key
  };
  const A first_lse = read_lse(lane);
  const int step = lanes * W, group = threadIdx.y * lanes % cuda::kWarpSize;
  // Words, which the compiler keeps together.
  using Raw = std::conditional_t<W * sizeof(T) == cuda::kPackBytes, uint4, Pack<T, W>>;
  Raw packs[kAtOnce][kHeld];
  const auto load = [&](int p, int part, int column) {
#pragma unroll
    for (int k = 0; k < kHeld; ++k)  // behind the row's end its last pack again, in vain
      packs[p][k] = *reinterpret_cast<const Raw*>(row_outs + part * outs.part + min(column + k * step, d_v - W));
  };
  // The first parts are on their way before it is known whether they have keys.
#pragma unroll
  for (int p = 0; p < kAtOnce; ++p)
    if (p < parts && d_v > 0) load(p, p, lane * W);

  SoftmaxState<A> state{first_lse, A(0)};
#pragma unroll 1
  for (int part = lane + lanes; part < parts; part += lanes) state.m = max(state.m, read_lse(part));
  for (int distance = lanes / 2; distance > 0; distance /= 2)
    state.m = max(state.m, __shfl_xor_sync(cuda::kAllLanes, state.m, distance));
  const A first_weight = exp_below_max(first_lse, state.m);
  state.l = first_weight;
#pragma unroll 1
  for (int part = lane + lanes; part < parts; part += lanes) state.l += exp_below_max(read_lse(part), state.m);
  state.l = cuda::lane_group_sum(state.l, lanes);
  // The sink joins under the common maximum: neither e^lse nor e^sink may overflow.
  const SoftmaxState<A> all = attn_sink ? merge(state, {attn_sink[h], A(1)}) : state;
  const A factor = softmax_rescale(state.m, all.m) / all.l;
  const bool own = own_row < rows;
  if (own && lane == 0)
    out_lse[(b * h_q.divisor() + h) * s_q.divisor() + i] = state.l == A(0) ? kInfinity<A> : lse(state);

  for (int begin_column = 0; begin_column < d_v; begin_column += kHeld * step) {
    const int column = begin_column + lane * W;
    A sums[kHeld][W] = {};
    for (int begin = 0; begin < parts; begin += lanes) {
      const A own_lse = begin == 0 ? first_lse : read_lse(begin + lane);
      const A own_exp = begin == 0 ? first_weight : exp_below_max(own_lse, state.m);
      const A own_weight = own_lse == -kInfinity<A> ? A(-1) : own_exp * factor;
      for (int first = 0; first < lanes && begin + first < parts; first += kAtOnce) {
        A weights[kAtOnce];
#pragma unroll
        for (int p = 0; p < kAtOnce; ++p) {
          const A weight = __shfl_sync(cuda::kAllLanes, own_weight, group + ((first + p) & (lanes - 1)));
          weights[p] = first + p < lanes ? weight : A(-1);
        }
        if (begin_column + begin + first > 0) {
#pragma unroll
          for (int p = 0; p < kAtOnce; ++p)
            if (!(weights[p] < A(0))) load(p, begin + first + p, column);
        }
#pragma unroll
        for (int p = 0; p < kAtOnce; ++p) {
          if (weights[p] < A(0)) continue;
#pragma unroll
          for (int k = 0; k < kHeld; ++k) {
            auto pack = __builtin_bit_cast(Pack<T, W>, packs[p][k]);
            cuda::use_from_here(pack);
            A x[W];
            widen(pack, x);
#pragma unroll
            for (int j = 0; j < W; ++j) sums[k][j] += weights[p] * x[j];
          }
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kHeld; ++k)
      if (own && column + k * step < d_v) cuda::store_narrowed(out + row * d_v + column + k * step, sums[k]);
  }
}

template <class T, int W>
void launch_merge(const MergeAttentionStatesArgs& a, const Launch& launch) {
  using A = Compute<T>;
  const auto &o = a.outs.stride, &l = a.lses.stride;
  const std::int64_t d_v = a.outs.size(4), rows = a.lse.numel();
  unsigned x = 1;
  while (x < cuda::kWarpSize && x * cuda::kPackSize<T> * kHeld < d_v) x *= 2;  // whatever W: it orders the lse's sum
  const dim3 block(x, kThreads / x);
  cuda::launch("merge_attention_states", merge_attention_states_cuda_kernel<T, W>,
               dim3(cuda::ceil_div<std::int64_t>(rows, block.y)), block, 0, launch,
               Parts<T>{a.outs.as<const T>(), o[0], o[1], o[2], o[3]},
               Parts<A>{a.lses.as<const A>(), l[0], l[1], l[3], l[2]}, a.attn_sink.as<const A>(),
               static_cast<int>(a.outs.size(0)), rows, cuda::Divider(a.outs.size(2)), cuda::Divider(a.outs.size(3)),
               static_cast<int>(d_v), a.out.as<T>(), a.lse.as<A>());
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
