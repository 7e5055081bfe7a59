// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <algorithm>

#include "src/indexer/indexer_logits/indexer_logits.h"
#include "src/indexer/score_cpu.h"

namespace dsm {
namespace {

using indexer::Key;
using indexer::KeyRange;

/// The source of indexer::score_block.
template <class A>
struct Contiguous {
  const IndexerLogitsArgs& a;
  std::int64_t heads = a.q.size(1), d = a.q.size(2);
  DType q_dtype = a.q.dtype, k_dtype = a.k.dtype;

  const void* q(std::int64_t i, std::int64_t h) const {
    return a.q.as<const char>() + (i * a.q.stride[0] + h * a.q.stride[1]) * element_size(q_dtype);
  }
  const A* weights(std::int64_t i) const { return a.weights.as<const A>() + i * a.weights.stride[0]; }
  KeyRange range(std::int64_t i) const { return indexer::key_range(a.starts, a.ends, i, a.k.size(0)); }
  Key k(std::int64_t j) const {
    return {a.k.as<const char>() + j * a.k.stride[0] * element_size(k_dtype),
            a.k_scale ? a.k_scale.as<const float>()[j] : 1.0f};
  }
  A* logits(std::int64_t i) const { return a.logits.as<A>() + i * a.k.size(0); }
};

template <class A>
void forward(const IndexerLogitsArgs& a) {
  const Contiguous<A> source{a};
  const std::int64_t s_q = a.q.size(0), s_kv = a.k.size(0), queries = indexer::block_queries(source.heads);
  // Neighbouring units share their queries.
  const std::int64_t key_blocks = (s_kv + indexer::kBlockKeys - 1) / indexer::kBlockKeys;
  parallel_for(0, (s_q + queries - 1) / queries * key_blocks, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t i = unit / key_blocks * queries, j = unit % key_blocks * indexer::kBlockKeys;
      indexer::score_block<A>(source, i, std::min(i + queries, s_q), j, std::min(j + indexer::kBlockKeys, s_kv));
    }
  });
}

}  // namespace

void indexer_logits_cpu(const IndexerLogitsArgs& args, const Launch&) {
  args.q.dtype == DType::float64 ? forward<double>(args) : forward<float>(args);
}

}  // namespace dsm
