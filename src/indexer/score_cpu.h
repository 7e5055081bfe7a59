// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "src/core/parallel_for.h"
#include "src/cpu/convert.h"
#include "src/cpu/gemm.h"
#include "src/indexer/key_range.h"
#include "src/numerics/fp8.h"

// The logits of indexer_logits and paged_indexer_logits on the CPU, block by block. `A` is float or double.
namespace dsm::indexer {

// A tile of scores has about this many rows (query, head) and this many keys: with its operands it fits a second-level
// cache. Queries are widened once per block of keys.
inline constexpr std::int64_t kTileRows = 512, kTileKeys = 128, kBlockKeys = 4096;

/// Where a key stands and what its logits are multiplied by; those of a key that does not exist are −∞.
struct Key {
  const void* row = nullptr;
  float scale = 1;
  bool exists = true;
};

/// Queries per block.
inline std::int64_t block_queries(std::int64_t heads) {
  return std::max<std::int64_t>(1, kTileRows / std::max<std::int64_t>(1, heads));
}

template <class A>
void widen_vector(const void* x, DType dtype, std::int64_t n, A* out) {
  if (dtype != DType::float8_e4m3fn) return cpu::widen(x, dtype, n, out);
  const auto* codes = static_cast<const float8_e4m3fn*>(x);
  for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<A>(to_float(codes[i]));
}

/// out[j] = Σ_h weights[h] · max(0, scores[h · n + j]) for j < n <= kTileKeys; NaN stays.
template <class A>
void weigh(const A* scores, const A* weights, std::int64_t heads, std::int64_t n, A* out) {
  A sum[kTileKeys] = {};
  for (std::int64_t h = 0; h < heads; ++h) {
    const A* s = scores + h * n;
    for (std::int64_t j = 0; j < n; ++j) sum[j] += weights[h] * (s[j] < A(0) ? A(0) : s[j]);
  }
  std::copy_n(sum, n, out);
}

/// The range that holds all keys of `block` that some of the queries see; empty at its end when there is none.
template <class Source>
KeyRange seen_keys(const Source& source, std::int64_t query, std::int64_t query_end, const KeyRange& block) {
  KeyRange seen{block.end, block.begin};
  for (; query < query_end; ++query) {
    const KeyRange range = source.range(query);
    const std::int64_t begin = std::max(block.begin, range.begin), end = std::min(block.end, range.end);
    if (begin >= end) continue;
    seen = {std::min(seen.begin, begin), std::max(seen.end, end)};
  }
  return seen.begin < seen.end ? seen : KeyRange{block.end, block.end};
}

/// Writes the logits of queries [query, query_end) for keys [key, key_end). The source says what they are:
///
///   heads, d, q_dtype, k_dtype
///   const void* q(i, h)         vector of a query's head
///   const A* weights(i)         [heads]
///   KeyRange range(i)           visible keys
///   Key k(j)                    only asked for keys between visible ones
///   A* logits(i)                row to write
template <class A, class Source>
void score_block(const Source& source, std::int64_t query, std::int64_t query_end, std::int64_t key,
                 std::int64_t key_end) {
  constexpr A kHidden = -std::numeric_limits<A>::infinity();
  const std::int64_t heads = source.heads, d = source.d, rows = (query_end - query) * heads;
  auto [first, last] = seen_keys(source, query, query_end, {key, key_end});
  for (std::int64_t i = query; i < query_end; ++i) {
    A* const logits = source.logits(i);
    std::fill(logits + key, logits + first, kHidden);
    std::fill(logits + last, logits + key_end, kHidden);
  }
  if (first == last) return;

  thread_local std::vector<A> q, k, scores;
  const auto float_matrix = [](const A* data, std::int64_t row_stride, std::int64_t col_stride) {
    return cpu::Matrix{data, sizeof(A) == 8 ? DType::float64 : DType::float32, row_stride, col_stride};
  };
  q.resize(std::max<std::size_t>(q.size(), rows * d));
  k.resize(std::max<std::size_t>(k.size(), kTileKeys * d));
  scores.resize(std::max<std::size_t>(scores.size(), rows * kTileKeys));
  for (std::int64_t row = 0; row < rows; ++row)
    widen_vector(source.q(query + row / heads, row % heads), source.q_dtype, d, q.data() + row * d);
  for (; first < last; first += kTileKeys) {
    const std::int64_t n = std::min(kTileKeys, last - first);
    Key keys[kTileKeys];
    for (std::int64_t j = 0; j < n; ++j) {
      keys[j] = source.k(first + j);
      if (keys[j].exists) {
        widen_vector(keys[j].row, source.k_dtype, d, k.data() + j * d);
      } else {
        std::fill_n(k.data() + j * d, d, A(0));
      }
    }
    cpu::gemm<A>(rows, n, d, A(1), float_matrix(q.data(), d, 1), float_matrix(k.data(), 1, d), A(0), scores.data(), n);
    for (std::int64_t i = query; i < query_end; ++i) {
      A* const logits = source.logits(i) + first;
      const KeyRange range = source.range(i);
      weigh(scores.data() + (i - query) * heads * n, source.weights(i), heads, n, logits);
      for (std::int64_t j = 0; j < n; ++j) {
        const bool visible = keys[j].exists && first + j >= range.begin && first + j < range.end;
        logits[j] = visible ? logits[j] * static_cast<A>(keys[j].scale) : kHidden;
      }
    }
  }
}

}  // namespace dsm::indexer
