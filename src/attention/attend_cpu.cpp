// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/attention/attend_cpu.h"

#include <cmath>
#include <limits>
#include <vector>

#include "src/cpu/vector_math.h"

namespace dsm::attention {
namespace {

// Tiles of scores, in elements: one (two in the backward pass) stays in a 512 KiB L2 cache next to its operands.
constexpr std::int64_t kTileElements = 32768, kMaxTileKeys = 4096;
constexpr std::int64_t kBackwardQueries = 64, kBackwardKeys = 64;

template <class A>
constexpr A kMinusInfinity = -std::numeric_limits<A>::infinity();

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

}  // namespace

template <class A>
void attend(const Head& head, std::int64_t begin, std::int64_t end, A* out, A* lse) {
  const std::int64_t queries = end - begin, d_v = head.d_v;
  const std::int64_t keys = head.visible(end - 1);
  const std::int64_t tile_keys = std::min({kTileElements / queries, kMaxTileKeys, keys});
  A* const tile = scratch<A>(queries * (tile_keys + 2));
  A* const peak = tile + queries * tile_keys;  // largest score of each query so far
  A* const sum = peak + queries;               // Σ exp(score − peak) so far
  std::fill(out, out + queries * d_v, A(0));
  std::fill(peak, peak + queries, kMinusInfinity<A>);
  std::fill(sum, sum + queries, A(0));

  for (std::int64_t key = 0; key < keys; key += tile_keys) {
    const std::int64_t n = std::min(tile_keys, keys - key);
    const std::int64_t first = std::max(begin, head.first_query(key)), m = end - first;
    const auto seen = [&](std::int64_t row) { return std::min(n, head.visible(first + row) - key); };
    cpu::gemm<A>(m, n, head.d_qk, static_cast<A>(head.softmax_scale), from(head.q, first),
                 transposed(from(head.k, key)), A(0), tile, n);
    for (std::int64_t row = 0; row < m; ++row) {
      const std::int64_t i = first - begin + row;
      A* p = tile + row * n;
      const A old_peak = peak[i];
      peak[i] = std::max(old_peak, cpu::max(p, seen(row)));
      // A query whose scores are all -inf keeps the sum 0.
      const A shift = peak[i] == kMinusInfinity<A> ? A(0) : peak[i];
      const A shrink = std::exp(old_peak - shift);
      sum[i] = sum[i] * shrink + cpu::exp_scaled(p, seen(row), A(1), shift);
      std::fill(p + seen(row), p + n, A(0));
      if (shrink != A(1)) cpu::scale(out + i * d_v, d_v, shrink);
    }
    masked_product<A>(seen(0) < n, m, d_v, n, A(1), rows_of(tile, n), from(head.v, key), out + (first - begin) * d_v,
                      [&](std::int64_t row) { return Columns(0, seen(row)); });
  }

  for (std::int64_t i = 0; i < queries; ++i) {
    const A inverse = sum[i] == A(0) ? A(0) : A(1) / sum[i];
    cpu::scale(out + i * d_v, d_v, inverse);
    lse[i] = sum[i] == A(0) ? kMinusInfinity<A> : peak[i] + std::log(sum[i]);
  }
}

template <class A>
void attend_backward(const Head& head, const HeadGradient<A>& g) {
  const std::int64_t d_qk = head.d_qk, d_v = head.d_v;
  const A scale = static_cast<A>(head.softmax_scale);
  A* const p = scratch<A>(2 * kBackwardQueries * kBackwardKeys);
  A* const ds = p + kBackwardQueries * kBackwardKeys;

  for (std::int64_t key = 0; key < head.s_kv; key += kBackwardKeys) {
    const std::int64_t n = std::min(kBackwardKeys, head.s_kv - key);
    for (std::int64_t query = head.first_query(key); query < head.s_q; query += kBackwardQueries) {
      const std::int64_t m = std::min(kBackwardQueries, head.s_q - query);
      const auto seen = [&](std::int64_t row) { return std::min(n, head.visible(query + row) - key); };
      const cpu::Matrix q = from(head.q, query), k = from(head.k, key), dout = from(g.dout, query);
      cpu::gemm<A>(m, n, d_qk, scale, q, transposed(k), A(0), p, n);
      cpu::gemm<A>(m, n, d_v, A(1), dout, transposed(from(head.v, key)), A(0), ds, n);
      for (std::int64_t row = 0; row < m; ++row) {
        A *p_row = p + row * n, *ds_row = ds + row * n;
        const A lse = g.lse[query + row], delta = g.delta[query + row];
        cpu::exp_scaled(p_row, seen(row), A(1), lse == kMinusInfinity<A> ? A(0) : lse);
        std::fill(p_row + seen(row), p_row + n, A(0));
        for (std::int64_t j = 0; j < seen(row); ++j) ds_row[j] = p_row[j] * (ds_row[j] - delta);
        std::fill(ds_row + seen(row), ds_row + n, A(0));
      }
      const bool masked = seen(0) < n;
      const auto keys_of = [&](std::int64_t row) { return Columns(0, seen(row)); };
      const auto queries_of = [&](std::int64_t row) {
        return Columns(std::clamp<std::int64_t>(head.first_query(key + row) - query, 0, m), m);
      };
      masked_product<A>(masked, n, d_v, m, A(1), transposed(rows_of(p, n)), dout, g.dv + key * d_v, queries_of);
      masked_product<A>(masked, n, d_qk, m, scale, transposed(rows_of(ds, n)), q, g.dk + key * d_qk, queries_of);
      masked_product<A>(masked, m, d_qk, n, scale, rows_of(ds, n), k, g.dq + query * d_qk, keys_of);
    }
  }
}

template void attend(const Head&, std::int64_t, std::int64_t, float*, float*);
template void attend(const Head&, std::int64_t, std::int64_t, double*, double*);
template void attend_backward(const Head&, const HeadGradient<float>&);
template void attend_backward(const Head&, const HeadGradient<double>&);

}  // namespace dsm::attention
