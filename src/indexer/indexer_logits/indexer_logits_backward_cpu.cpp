// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <algorithm>
#include <vector>

#include "src/core/parallel_for.h"
#include "src/cpu/convert.h"
#include "src/cpu/gemm.h"
#include "src/cpu/vector_math.h"
#include "src/indexer/indexer_logits/indexer_logits.h"
#include "src/indexer/key_range.h"

namespace dsm {
namespace {

using indexer::KeyRange;

// Keys of a tile of scores.
constexpr std::int64_t kTileKeys = 128;

/// Products of one query with some keys. The scores are made twice, once for the queries' gradients and once for the
/// keys': so each output is summed by one thread and no score is kept.
template <class A>
class Scores {
 public:
  explicit Scores(const IndexerLogitsBackwardArgs& a) : a_(a), ds_(heads() * kTileKeys) {}

  std::int64_t heads() const { return a_.q.size(1); }
  std::int64_t d() const { return a_.q.size(2); }

  /// Makes ds[h][j] of query i for the n keys from `key` on, all of which it sees. Adds to dweights unless null.
  void differentiate(std::int64_t i, std::int64_t key, std::int64_t n, A* dweights) {
    cpu::Matrix keys = k(key);
    std::swap(keys.row_stride, keys.col_stride);
    cpu::gemm<A>(heads(), n, d(), A(1), q(i), keys, A(0), ds_.data(), n);
    const A* const g = a_.dlogits.as<const A>() + i * a_.dlogits.stride[0] + key;
    const A* const weights = a_.weights.as<const A>() + i * a_.weights.stride[0];
    for (std::int64_t h = 0; h < heads(); ++h) {
      A* const s = ds_.data() + h * n;
      if (dweights) {
        for (std::int64_t j = 0; j < n; ++j) s[j] = s[j] < A(0) ? A(0) : s[j];
        dweights[h] += cpu::dot(s, g, n);
      }
      for (std::int64_t j = 0; j < n; ++j) s[j] = s[j] > A(0) ? g[j] * weights[h] : A(0);
    }
  }

  /// dq[heads, d] += ds · k
  void add_to_queries(std::int64_t key, std::int64_t n, A* dq) const {
    cpu::gemm<A>(heads(), d(), n, A(1), ds(n, 1), k(key), A(1), dq, d());
  }
  /// dk[n, d] += dsᵀ · q
  void add_to_keys(std::int64_t i, std::int64_t n, A* dk) const {
    cpu::gemm<A>(n, d(), heads(), A(1), ds(1, n), q(i), A(1), dk, d());
  }

 private:
  cpu::Matrix q(std::int64_t i) const {
    return {a_.q.as<const char>() + i * a_.q.stride[0] * element_size(a_.q.dtype), a_.q.dtype, a_.q.stride[1], 1};
  }
  cpu::Matrix k(std::int64_t j) const {
    return {a_.k.as<const char>() + j * a_.k.stride[0] * element_size(a_.k.dtype), a_.k.dtype, a_.k.stride[0], 1};
  }
  cpu::Matrix ds(std::int64_t row_stride, std::int64_t col_stride) const {
    return {ds_.data(), sizeof(A) == 8 ? DType::float64 : DType::float32, row_stride, col_stride};
  }

  const IndexerLogitsBackwardArgs& a_;
  std::vector<A> ds_;
};

template <class A>
void backward(const IndexerLogitsBackwardArgs& a) {
  const std::int64_t s_q = a.q.size(0), heads = a.q.size(1), d = a.q.size(2), s_kv = a.k.size(0);
  const auto range = [&](std::int64_t i) { return indexer::key_range(a.starts, a.ends, i, s_kv); };

  parallel_for(0, s_q, 1, [&](std::int64_t begin, std::int64_t end) {
    Scores<A> scores(a);
    std::vector<A> dq(heads * d);
    for (std::int64_t i = begin; i < end; ++i) {
      A* const dweights = a.dweights.as<A>() + i * heads;
      std::fill_n(dweights, heads, A(0));
      std::fill(dq.begin(), dq.end(), A(0));
      const KeyRange seen = range(i);
      for (std::int64_t key = seen.begin; key < seen.end; key += kTileKeys) {
        const std::int64_t n = std::min(kTileKeys, seen.end - key);
        scores.differentiate(i, key, n, dweights);
        scores.add_to_queries(key, n, dq.data());
      }
      cpu::narrow(dq.data(), heads * d, a.dq.as<char>() + i * heads * d * element_size(a.dq.dtype), a.dq.dtype);
    }
  });

  parallel_for(0, (s_kv + kTileKeys - 1) / kTileKeys, 1, [&](std::int64_t begin, std::int64_t end) {
    Scores<A> scores(a);
    std::vector<A> dk(kTileKeys * d);
    for (std::int64_t tile = begin; tile < end; ++tile) {
      const std::int64_t first = tile * kTileKeys, last = std::min(first + kTileKeys, s_kv);
      std::fill(dk.begin(), dk.end(), A(0));
      for (std::int64_t i = 0; i < s_q; ++i) {
        const KeyRange seen = range(i);
        const std::int64_t key = std::max(first, seen.begin), n = std::min(last, seen.end) - key;
        if (n <= 0) continue;
        scores.differentiate(i, key, n, nullptr);
        scores.add_to_keys(i, n, dk.data() + (key - first) * d);
      }
      cpu::narrow(dk.data(), (last - first) * d, a.dk.as<char>() + first * d * element_size(a.dk.dtype), a.dk.dtype);
    }
  });
}

}  // namespace

void indexer_logits_backward_cpu(const IndexerLogitsBackwardArgs& args, const Launch&) {
  args.q.dtype == DType::float64 ? backward<double>(args) : backward<float>(args);
}

}  // namespace dsm
