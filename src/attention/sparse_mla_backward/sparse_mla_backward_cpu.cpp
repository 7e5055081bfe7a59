// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstdint>
#include <vector>

#include "src/attention/sparse_mla_backward/sparse_mla_backward.h"
#include "src/attention/sparse_mla_cpu.h"
#include "src/cpu/convert.h"
#include "src/cpu/vector_math.h"
#include "src/numerics/softmax_merge.h"

// The queries are taken in blocks. First each query's probabilities, gradients of scores and dq are made, split over
// the threads by query. Then each thread adds what the block's queries have for all rows of dkv, in order, to columns
// of its own: dkv needs neither locks nor copies, and its bits depend on neither blocks nor threads.
namespace dsm {
namespace {

using attention::from;
using attention::heads_of;
using attention::product;
using attention::rows_of;
using attention::transposed;

// Probabilities and gradients of scores of a block of queries, in elements, unless the threads need more queries.
constexpr std::int64_t kBlockElements = 4 << 20;
// Keys whose gradients are made at once: as many rows as a product keeps in cache.
constexpr std::int64_t kKeysPerTile = 96;
// Columns that a thread owns come in units of a cache line.
constexpr std::int64_t kColumnUnit = 16;

/// One query and key head after the first step; p and ds are [keys, heads].
template <class A>
struct Unit {
  attention::SelectedKeys keys;
  std::vector<A> p, ds;
};

/// Scratch of a thread for one query's group of heads.
template <class A>
struct Scratch {
  std::vector<A> dq, wide;
  std::vector<A> dot;   ///< D_h
  std::vector<A> kept;  ///< f_h: what the sink leaves of the probabilities
};

/// Probabilities, gradients of scores and dq of a query and key head; its term of dattn_sink.
template <class A>
void differentiate_scores(const SparseMlaBackwardArgs& a, std::int64_t query, std::int64_t kv_head, Scratch<A>& scratch,
                          Unit<A>& unit, A* sink_terms) {
  const std::int64_t group = a.q.size(1) / a.kv.size(1), head = kv_head * group, d_qk = a.q.size(2);
  const std::int64_t d_v = a.out.size(2), statistics = query * a.q.size(1) + head;
  const A* const lse = a.lse.as<const A>() + statistics;
  const A* const dlse = a.dlse ? a.dlse.as<const A>() + statistics : nullptr;
  const A scale = static_cast<A>(a.softmax_scale);
  const cpu::Matrix dout = heads_of(a.dout, query, head), out = heads_of(a.out, query, head);
  unit.keys.select(a, query, kv_head);
  const std::int64_t n = unit.keys.count();
  unit.p.resize(n * group);
  unit.ds.resize(n * group);
  scratch.wide.resize(2 * d_v);
  scratch.dot.resize(group);
  scratch.kept.resize(group);
  for (std::int64_t h = 0; h < group; ++h) {
    cpu::widen(from(dout, h).data, dout.dtype, d_v, scratch.wide.data());
    cpu::widen(from(out, h).data, out.dtype, d_v, scratch.wide.data() + d_v);
    scratch.dot[h] = cpu::dot(scratch.wide.data(), scratch.wide.data() + d_v, d_v);
    scratch.kept[h] = A(1);
    if (!a.attn_sink) continue;
    const MergedLse<A> merged = merge_lse(lse[h], a.attn_sink.as<const A>()[head + h]);
    scratch.kept[h] = merged.a;
    sink_terms[h] = n > 0 ? -merged.b * scratch.dot[h] : A(0);
  }

  const cpu::Matrix kv = unit.keys.of(a.kv, kv_head);
  A *const p = unit.p.data(), *const ds = unit.ds.data();
  product(n, group, d_qk, scale, kv, transposed(heads_of(a.q, query, head)), p);
  product(n, group, d_v, A(1), kv, transposed(dout), ds);
  for (std::int64_t j = 0; j < n; ++j)
    for (std::int64_t h = 0; h < group; ++h) p[j * group + h] -= lse[h];
  cpu::exp_scaled(p, n * group, A(1), A(0));
  for (std::int64_t j = 0; j < n; ++j) {
    A *const p_j = p + j * group, *const ds_j = ds + j * group;
    for (std::int64_t h = 0; h < group; ++h) {
      ds_j[h] = p_j[h] * (scratch.kept[h] * (ds_j[h] - scratch.dot[h]) + (dlse ? dlse[h] : A(0)));
      p_j[h] *= scratch.kept[h];
    }
  }
  scratch.dq.resize(group * d_qk);
  product(group, d_qk, n, scale, transposed(rows_of(ds, group)), kv, scratch.dq.data());
  attention::store_rows(scratch.dq.data(), group, d_qk, a.dq, statistics * d_qk, d_qk);
}

/// Adds the terms of one query and key head to columns [begin, end) of dkv [s_kv, h_kv, d_qk].
template <class A>
void add_key_gradients(const SparseMlaBackwardArgs& a, std::int64_t query, std::int64_t kv_head, const Unit<A>& unit,
                       std::int64_t begin, std::int64_t end, A* tile, A* dkv) {
  const std::int64_t h_kv = a.kv.size(1), group = a.q.size(1) / h_kv, head = kv_head * group, d_qk = a.q.size(2);
  const std::int64_t width = end - begin, value_width = std::clamp<std::int64_t>(a.out.size(2) - begin, 0, width);
  const cpu::Matrix q = from(heads_of(a.q, query, head), 0, begin), dout = heads_of(a.dout, query, head);
  const cpu::Matrix p = rows_of(unit.p.data(), group), ds = rows_of(unit.ds.data(), group);
  for (std::int64_t key = 0; key < unit.keys.count(); key += kKeysPerTile) {
    const std::int64_t n = std::min(kKeysPerTile, unit.keys.count() - key);
    cpu::gemm(n, width, group, static_cast<A>(a.softmax_scale), from(ds, key), q, A(0), tile, width);
    if (value_width > 0) cpu::gemm(n, value_width, group, A(1), from(p, key), from(dout, 0, begin), A(1), tile, width);
    for (std::int64_t j = 0; j < n; ++j) {
      A* const target = dkv + (unit.keys.rows[key + j] * h_kv + kv_head) * d_qk + begin;
      for (std::int64_t c = 0; c < width; ++c) target[c] += tile[j * width + c];
    }
  }
}

template <class A>
void backward(const SparseMlaBackwardArgs& a) {
  const std::int64_t s_q = a.q.size(0), h_q = a.q.size(1), d_qk = a.q.size(2), d_v = a.out.size(2);
  const std::int64_t h_kv = a.kv.size(1), group = h_q / h_kv, threads = num_threads();
  // Summed where it is wanted if that is in the type computed in.
  const bool in_place = element_size(a.dkv.dtype) == sizeof(A);
  std::vector<A> sums(in_place ? 0 : a.dkv.numel()), sink_terms(a.attn_sink ? s_q * h_q : 0);
  A* const dkv = in_place ? a.dkv.as<A>() : sums.data();
  if (in_place) std::fill(dkv, dkv + a.dkv.numel(), A(0));

  const std::int64_t pairs = a.indices.size(2) * h_q;  // of a head and a key, for one query
  const std::int64_t block = std::clamp<std::int64_t>(kBlockElements / std::max<std::int64_t>(2 * pairs, 1),
                                                      2 * threads, std::max(s_q, 2 * threads));
  const std::int64_t share = (d_qk + threads - 1) / threads;
  const std::int64_t width = (share + kColumnUnit - 1) / kColumnUnit * kColumnUnit;
  const std::int64_t strips = width > 0 ? (d_qk + width - 1) / width : 0;
  std::vector<Unit<A>> units(std::min(block, s_q) * h_kv);
  for (std::int64_t begin = 0; begin < s_q; begin += block) {
    const std::int64_t queries = std::min(block, s_q - begin), count = queries * h_kv;
    parallel_for(0, count, attention::head_grain(count, queries * pairs * (2 * d_qk + d_v)),
                 [&](std::int64_t first, std::int64_t last) {
                   Scratch<A> scratch;
                   for (std::int64_t unit = first; unit < last; ++unit) {
                     const std::int64_t query = begin + unit / h_kv, kv_head = unit % h_kv;
                     A* const terms = a.attn_sink ? sink_terms.data() + query * h_q + kv_head * group : nullptr;
                     differentiate_scores(a, query, kv_head, scratch, units[unit], terms);
                   }
                 });
    const std::int64_t owners = h_kv * strips;
    parallel_for(0, owners, 1, [&](std::int64_t first, std::int64_t last) {
      std::vector<A> tile(kKeysPerTile * width);
      for (std::int64_t owner = first; owner < last; ++owner) {
        const std::int64_t kv_head = owner / strips, column = owner % strips * width;
        for (std::int64_t query = 0; query < queries; ++query) {
          add_key_gradients(a, begin + query, kv_head, units[query * h_kv + kv_head], column,
                            std::min(column + width, d_qk), tile.data(), dkv);
        }
      }
    });
  }

  if (!in_place) cpu::narrow(dkv, a.dkv.numel(), a.dkv.data, a.dkv.dtype);
  for (std::int64_t h = 0; a.attn_sink && h < h_q; ++h) {
    double sum = 0;
    for (std::int64_t query = 0; query < s_q; ++query) sum += sink_terms[query * h_q + h];
    a.dattn_sink.as<A>()[h] = static_cast<A>(sum);
  }
}

}  // namespace

void sparse_mla_backward_cpu(const SparseMlaBackwardArgs& args, const Launch&) {
  args.q.dtype == DType::float64 ? backward<double>(args) : backward<float>(args);
}

}  // namespace dsm
