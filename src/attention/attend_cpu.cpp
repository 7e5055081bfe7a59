// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/attention/attend_cpu.h"

#include <vector>

#include "src/core/parallel_for.h"
#include "src/cpu/vector_math.h"
#include "src/numerics/softmax_merge.h"

namespace dsm::attention {
namespace {

// A tile of scores, in elements, that stays in a 512 KiB L2 cache next to its operands.
constexpr std::int64_t kTileElements = 32768, kMaxTileKeys = 4096;
// Keys and queries of a tile in the backward pass.
constexpr std::int64_t kBackwardTile = 64;
// So few queries are a decoding step, whose keys are cut into parts of this many. Both are part of the result.
constexpr std::int64_t kFewQueries = 16, kKeysPerPart = 8192;

/// Scratch of the calling thread, kept for its next call. Contents arbitrary.
template <class A>
A* scratch(std::int64_t elements) {
  thread_local std::vector<A> memory;
  if (static_cast<std::int64_t>(memory.size()) < elements) memory.resize(elements);
  return memory.data();
}

template <class Bits>
bool finite_rows(const cpu::Matrix& matrix, std::int64_t rows, std::int64_t columns, Bits exponent) {
  for (std::int64_t row = 0; row < rows; ++row) {
    const Bits* x = static_cast<const Bits*>(matrix.data) + row * matrix.row_stride;
    Bits special = 0;
    for (std::int64_t i = 0; i < columns; ++i) special |= (x[i] & exponent) == exponent;
    if (special) return false;
  }
  return true;
}

/// Whether no element is an infinity or NaN, that is, has an exponent of all ones.
bool finite(const cpu::Matrix& matrix, std::int64_t rows, std::int64_t columns) {
  switch (matrix.dtype) {
    case DType::float64:
      return finite_rows<std::uint64_t>(matrix, rows, columns, 0x7ff0'0000'0000'0000);
    case DType::float16:
      return finite_rows<std::uint16_t>(matrix, rows, columns, 0x7c00);
    case DType::bfloat16:
      return finite_rows<std::uint16_t>(matrix, rows, columns, 0x7f80);
    default:
      return finite_rows<std::uint32_t>(matrix, rows, columns, 0x7f80'0000);
  }
}

/// C[m,n] += alpha · A[m,k] B[k,n], where row r of A is zero outside the columns range(r) = [first, last) because its
/// pairs of query and key do not exist: rows of B there must not count even if they are not finite (0 · NaN is NaN).
template <class A, class Range>
void masked_product(bool masked, std::int64_t m, std::int64_t n, std::int64_t k, A alpha, const cpu::Matrix& a,
                    const cpu::Matrix& b, A* c, const Range& range) {
  if (!masked || finite(b, k, n)) return cpu::gemm<A>(m, n, k, alpha, a, b, A(1), c, n);
  for (std::int64_t row = 0; row < m; ++row) {
    const auto [first, last] = range(row);
    cpu::gemm<A>(1, n, last - first, alpha, from(a, row, first), from(b, first), A(1), c + row * n, n);
  }
}

using Columns = std::pair<std::int64_t, std::int64_t>;

/// What to subtract from scores with this maximum or log-sum-exp. If it is -inf, so are all of them, and exp gives 0.
template <class A>
A finite_shift(A m) {
  return m == -kInfinity<A> ? A(0) : m;
}

/// Outputs and log-sum-exps of queries [begin, end) over the keys [key_begin, key_end) alone.
template <class A>
void attend_keys(const Head& head, std::int64_t begin, std::int64_t end, std::int64_t key_begin, std::int64_t key_end,
                 A* out, A* lse_out) {
  const std::int64_t queries = end - begin, d_v = head.d_v;
  const std::int64_t tile_keys = std::min({kTileElements / queries, kMaxTileKeys, key_end - key_begin});
  A* const tile = scratch<A>(queries * tile_keys);
  std::vector<SoftmaxState<A>> states(queries);
  std::fill(out, out + queries * d_v, A(0));

  for (std::int64_t key = key_begin; key < key_end; key += tile_keys) {
    const std::int64_t n = std::min(tile_keys, key_end - key);
    const std::int64_t first = std::max(begin, head.first_query(key)), m = end - first;
    const auto seen = [&](std::int64_t row) { return std::min(n, head.visible(first + row) - key); };
    cpu::gemm<A>(m, n, head.d_qk, static_cast<A>(head.softmax_scale), from(head.q, first),
                 transposed(from(head.k, key)), A(0), tile, n);
    for (std::int64_t row = 0; row < m; ++row) {
      SoftmaxState<A>& state = states[first - begin + row];
      A* const p = tile + row * n;
      const A old_max = state.m;
      state.m = std::max(old_max, cpu::max(p, seen(row)));
      const A rescale = softmax_rescale(old_max, state.m);
      state.l = state.l * rescale + cpu::exp_scaled(p, seen(row), A(1), finite_shift(state.m));
      std::fill(p + seen(row), p + n, A(0));
      if (rescale != A(1)) cpu::scale(out + (first - begin + row) * d_v, d_v, rescale);
    }
    masked_product<A>(seen(0) < n, m, d_v, n, A(1), rows_of(tile, n), from(head.v, key), out + (first - begin) * d_v,
                      [&](std::int64_t row) { return Columns(0, seen(row)); });
  }

  for (std::int64_t i = 0; i < queries; ++i) {
    cpu::scale(out + i * d_v, d_v, states[i].l == A(0) ? A(0) : A(1) / states[i].l);
    lse_out[i] = lse(states[i]);
  }
}

/// One tile of the gradients' sums: keys from `key` on, queries from `query` to at most `query_end`.
template <class A>
void backward_tile(const Head& head, const HeadGradient<A>& g, std::int64_t key, std::int64_t query,
                   std::int64_t query_end, bool into_keys, bool into_queries) {
  const std::int64_t d_qk = head.d_qk, d_v = head.d_v;
  const std::int64_t n = std::min(kBackwardTile, head.s_kv - key), m = std::min(kBackwardTile, query_end - query);
  const A scale = static_cast<A>(head.softmax_scale);
  const cpu::Matrix q = from(head.q, query), k = from(head.k, key), v = from(head.v, key), dout = from(g.dout, query);
  A* const p = scratch<A>(2 * kBackwardTile * kBackwardTile);
  A* const ds = p + kBackwardTile * kBackwardTile;

  const auto seen = [&](std::int64_t row) { return std::min(n, head.visible(query + row) - key); };
  cpu::gemm<A>(m, n, d_qk, scale, q, transposed(k), A(0), p, n);
  cpu::gemm<A>(m, n, d_v, A(1), dout, transposed(v), A(0), ds, n);
  for (std::int64_t row = 0; row < m; ++row) {
    A *const p_row = p + row * n, *const ds_row = ds + row * n;
    const A delta = g.delta[query + row];
    cpu::exp_scaled(p_row, seen(row), A(1), finite_shift(g.lse[query + row]));
    for (std::int64_t j = 0; j < seen(row); ++j) ds_row[j] = p_row[j] * (ds_row[j] - delta);
    std::fill(p_row + seen(row), p_row + n, A(0));
    std::fill(ds_row + seen(row), ds_row + n, A(0));
  }

  const bool masked = seen(0) < n;
  if (into_keys) {
    const auto queries_of = [&](std::int64_t row) {
      return Columns(std::clamp<std::int64_t>(head.first_query(key + row) - query, 0, m), m);
    };
    masked_product<A>(masked, n, d_v, m, A(1), transposed(rows_of(p, n)), dout, g.dv + key * d_v, queries_of);
    masked_product<A>(masked, n, d_qk, m, scale, transposed(rows_of(ds, n)), q, g.dk + key * d_qk, queries_of);
  }
  if (into_queries) {
    masked_product<A>(masked, m, d_qk, n, scale, rows_of(ds, n), k, g.dq + query * d_qk,
                      [&](std::int64_t row) { return Columns(0, seen(row)); });
  }
}

}  // namespace

template <class A>
void attend(const Head& head, std::int64_t begin, std::int64_t end, A* out, A* lse) {
  const std::int64_t queries = end - begin, keys = head.visible(end - 1), d_v = head.d_v;
  if (queries > kFewQueries || keys < 2 * kKeysPerPart) return attend_keys(head, begin, end, 0, keys, out, lse);

  // Decoding over many keys: parts of them in parallel, merged in order.
  const std::int64_t parts = (keys + kKeysPerPart - 1) / kKeysPerPart, part_size = queries * (d_v + 1);
  std::vector<A> memory(parts * part_size);
  const auto part_out = [&](std::int64_t part) { return memory.data() + part * part_size; };
  const auto part_lse = [&](std::int64_t part) { return part_out(part) + queries * d_v; };
  parallel_for(0, parts, 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t part = first; part < last; ++part) {
      const std::int64_t key = part * kKeysPerPart;
      attend_keys(head, begin, end, key, std::min(key + kKeysPerPart, keys), part_out(part), part_lse(part));
    }
  });
  std::copy(part_out(0), part_out(0) + queries * d_v, out);
  std::copy(part_lse(0), part_lse(0) + queries, lse);
  for (std::int64_t part = 1; part < parts; ++part) {
    for (std::int64_t i = 0; i < queries; ++i) {
      const MergedLse<A> merged = merge_lse(lse[i], part_lse(part)[i]);
      lse[i] = merged.lse;
      for (std::int64_t c = 0; c < d_v; ++c)
        out[i * d_v + c] = merged.a * out[i * d_v + c] + merged.b * part_out(part)[i * d_v + c];
    }
  }
}

template <class A>
void attend_backward(const Head& head, const HeadGradient<A>& g) {
  const std::int64_t key_tiles = (head.s_kv + kBackwardTile - 1) / kBackwardTile;
  const std::int64_t query_tiles = (head.s_q + kBackwardTile - 1) / kBackwardTile;
  // One thread adds each tile to all three gradients. Several would then add to the same rows of one of them, so they
  // go over the tiles twice: by keys for dk and dv, by queries for dq. Every sum keeps its order, hence its bits.
  constexpr std::int64_t worth_sharing = 8;
  const bool one_pass = num_threads() == 1 || key_tiles * query_tiles < worth_sharing;
  parallel_for(0, key_tiles, one_pass ? key_tiles : 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t key = first * kBackwardTile; key < std::min(last * kBackwardTile, head.s_kv);
         key += kBackwardTile)
      for (std::int64_t query = head.first_query(key); query < head.s_q; query += kBackwardTile)
        backward_tile(head, g, key, query, head.s_q, true, one_pass);
  });
  if (one_pass) return;
  parallel_for(0, query_tiles, 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t tile = first; tile < last; ++tile) {
      const std::int64_t end = std::min((tile + 1) * kBackwardTile, head.s_q);
      for (std::int64_t key = 0; key < head.visible(end - 1); key += kBackwardTile)
        backward_tile(head, g, key, std::max(tile * kBackwardTile, head.first_query(key)), end, false, true);
    }
  });
}

template void attend(const Head&, std::int64_t, std::int64_t, float*, float*);
template void attend(const Head&, std::int64_t, std::int64_t, double*, double*);
template void attend_backward(const Head&, const HeadGradient<float>&);
template void attend_backward(const Head&, const HeadGradient<double>&);

}  // namespace dsm::attention
