// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "src/attention/sparse_mla_prefill/sparse_mla_prefill_sm90_rows.cuh"

namespace dsm::sparse_prefill_sm90 {

using namespace cuda;

template <class T, int kTiles>
__device__ void attend_first(const Problem& problem, const CUtensorMap& out, Shared<kTiles>& shared) {
  const float scale = problem.softmax_scale * kLog2e;
  float s[32], o[128];
  std::uint32_t p[4][4];
  float factor[2], sink[2];
  uint2 valid;
  std::uint32_t parity = 0, q_parity = 0;
  Tile* const k0 = shared.k[0];

  const auto await_keys = [&](int group) {
    shared.k_ready[0][group].wait(parity);
    fence_async_shared();
    wgmma_fence();
  };
  // Behind a product of the output, if any: what that has read is let go as soon as it is done.
  const auto begin_scores = [&](bool releases) {
    shared.valid_ready[0].wait(parity);
    valid = *reinterpret_cast<const uint2*>(shared.valid[0]);
    shared.q_ready.wait(q_parity);
    wgmma_registers(s);
    await_keys(0);
    multiply_tiles<T, 0, 1>(s, shared.q, k0, false);
    wgmma_commit();
    wgmma_wait<1>();
    wgmma_registers(o);
    if (releases) arrive_once_a_warp(shared.k_free[1][kLeft]);
    multiply_tiles<T, 1, 2>(s, shared.q, k0, true);
    await_keys(1);
    multiply_tiles<T, 2, 4>(s, shared.q, k0, true);
    await_keys(2);
    multiply_tiles<T, 4, 6>(s, shared.q, k0, true);
    await_keys(3);
    multiply_tiles<T, 6, kTiles - 1>(s, shared.q, k0, true);
    wgmma_commit();
    multiply_tiles<T, kTiles - 1, kTiles>(s, shared.q, k0, true);
    wgmma_commit();
  };
  // The tensor cores serve both warpgroups alike: products begun too early would delay the other's.
  const auto await_scores = [&](bool begun) {
    wgmma_wait<1>();
    if (begun) named_arrive(kFirstScored, kConsumers);
    wgmma_wait<0>();
    wgmma_registers(s);
  };

  Item item;
  const auto take_item = [&] {
    shared.valid_ready[0].wait(parity);
    item = shared.item[0];
  };
  Rows rows;
  take_item();
  begin_scores(false);
  await_scores(true);
  for (int pair = 0; item.query >= 0;) {
    const bool last = pair + 1 == item.pairs;
    if (last) arrive_once_a_warp(shared.q_free);
    float top[2];
    find_top(s, valid, top);
    rows.raise(top, scale, factor);
    tell_references(shared.first, rows);
    named_arrive(kFirstRaised, kConsumers);
    weigh_keys<T, 0, 8>(s, scale, rows, p);
    rescale(o, factor);
    wgmma_registers(o);
    wgmma_fence();
    weigh_values<T>(o, p, k0, pair > 0);
    wgmma_commit();
    store_weights<0, 4>(shared.p0, p);
    if (last) tell_sums(shared.first, rows);
    fence_async_shared();
    named_arrive(kFirstWeighed, kConsumers);
    wgmma_wait<0>();
    wgmma_registers(o);
    arrive_once_a_warp(shared.k_free[0][kLeft]);
    if (last) load_sinks(problem, item, sink);

    named_sync(kSecondRaised, kConsumers);
    rows.move({shared.second[row_of()].reference, shared.second[row_of() + 8].reference}, factor);
    rescale(o, factor);
    named_sync(kSecondBegun, kConsumers);
    wgmma_registers(o);
    wgmma_fence();
    weigh_values<T, 0, 2>(o, shared.k[1][8], shared.k[1], true);
    wgmma_commit();
    named_sync(kSecondWeighed, kConsumers);
    weigh_values<T, 2, 4>(o, shared.k[1][8], shared.k[1], true);
    wgmma_commit();
    parity ^= 1;
    ++pair;
    if (last) {
      wgmma_wait<0>();
      wgmma_registers(o);
      named_sync(kFirstDone, 128);
      const float sum[2] = {rows.sum[0] + shared.second[row_of()].sum, rows.sum[1] + shared.second[row_of() + 8].sum};
      stage_output<T>(shared.k[1], o, rows, sum, sink);
      store_staged(out, shared.k[1], item, 0);
      take_item();
      rows = Rows();
      pair = 0;
      q_parity ^= 1;
    }
    const bool more = item.query >= 0;
    if (more) begin_scores(!last);
    if (last) release_staged(shared.k_free[1][kLeft]);
    await_scores(more);
  }
}

template <class T, int kTiles>
__device__ void attend_second(const Problem& problem, const CUtensorMap& out, Shared<kTiles>& shared) {
  const float scale = problem.softmax_scale * kLog2e;
  float s[32], o[128];
  std::uint32_t p[4][4];
  float factor[2], sink[2];
  std::uint32_t parity = 0, q_parity = 0;
  Tile *const k0 = shared.k[0], *const k1 = shared.k[1];

  const auto await_keys = [&](int group) {
    shared.k_ready[1][group].wait(parity);
    fence_async_shared();
    wgmma_fence();
  };
  Item item;
  Rows rows;
  for (int pair = 0;; parity ^= 1) {
    shared.valid_ready[1].wait(parity);
    if (pair == 0) item = shared.item[1];
    if (item.query < 0) break;
    const bool last = pair + 1 == item.pairs;
    const uint2 valid = *reinterpret_cast<const uint2*>(shared.valid[1]);
    shared.q_ready.wait(q_parity);
    wgmma_registers(s);
    await_keys(0);
    named_sync(kFirstScored, kConsumers);
    multiply_tiles<T, 0, 2>(s, shared.q, k1, false);
    await_keys(1);
    multiply_tiles<T, 2, 4>(s, shared.q, k1, true);
    multiply_tiles<T, 8, kTiles>(s, shared.q, k1, true);
    await_keys(2);
    multiply_tiles<T, 4, 6>(s, shared.q, k1, true);
    await_keys(3);
    multiply_tiles<T, 6, 8>(s, shared.q, k1, true);
    wgmma_commit();
    named_sync(kFirstRaised, kConsumers);
    float before[2];
    rows.move({shared.first[row_of()].reference, shared.first[row_of() + 8].reference}, before);
    wgmma_wait<1>();  // long since: the compiler wants to be told
    wgmma_registers(o);
    rescale(o, before);
    wgmma_wait<0>();
    wgmma_registers(s);
    if (last) arrive_once_a_warp(shared.q_free);

    float top[2];
    find_top(s, valid, top);
    rows.raise(top, scale, factor);
    tell_references(shared.second, rows);
    named_arrive(kSecondRaised, kConsumers);
    named_sync(kFirstWeighed, kConsumers);
    const RowState other[2] = {shared.first[row_of()], shared.first[row_of() + 8]};
    wgmma_registers(o);
    wgmma_fence();
    weigh_values<T>(o, shared.p0, k0 + 4, pair > 0);
    wgmma_commit();
    weigh_keys<T, 0, 4>(s, scale, rows, p);
    store_weights<0, 2>(k1[8], p);
    fence_async_shared();
    named_arrive(kSecondBegun, kConsumers);
    wgmma_wait<0>();
    wgmma_registers(o);
    arrive_once_a_warp(shared.k_free[0][kRight]);
    weigh_keys<T, 4, 8>(s, scale, rows, p);
    store_weights<2, 4>(k1[8], p);
    if (last) tell_sums(shared.second, rows);
    fence_async_shared();
    named_arrive(kSecondWeighed, kConsumers);
    rescale(o, factor);
    wgmma_registers(o);
    wgmma_fence();
    weigh_values<T>(o, p, k1 + 4, true);
    wgmma_commit();
    if (last) load_sinks(problem, item, sink);
    wgmma_wait<0>();
    wgmma_registers(o);
    ++pair;
    if (!last) {
      arrive_once_a_warp(shared.k_free[1][kRight]);
      continue;
    }

    const float sum[2] = {__fadd_rn(__fmul_rn(other[0].sum, factor[0]), rows.sum[0]),
                          __fadd_rn(__fmul_rn(other[1].sum, factor[1]), rows.sum[1])};
    named_sync(kSecondDone, 128);
    stage_output<T>(k1 + 4, o, rows, sum, sink);
    store_staged(out, k1 + 4, item, 4);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int head = item.head_tile * kHeads + row_of() + 8 * i;
      if (threadIdx.x % 4 != 0 || head >= problem.h_q) continue;
      const bool none = sum[i] == 0;
      store_statistics(problem, item.query, head,
                       none ? -INFINITY : fmaxf(rows.top[i], other[i].top) * problem.softmax_scale,
                       none ? INFINITY : (rows.reference[i] + log2f(sum[i])) * kLn2);
    }
    release_staged(shared.k_free[1][kRight]);
    rows = Rows();
    pair = 0;
    q_parity ^= 1;
  }
}

}  // namespace dsm::sparse_prefill_sm90
