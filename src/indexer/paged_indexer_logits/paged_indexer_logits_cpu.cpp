// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstring>

#include "src/indexer/paged_indexer_logits/paged_indexer_logits.h"
#include "src/indexer/score_cpu.h"

namespace dsm {
namespace {

using indexer::Key;
using indexer::KeyRange;

/// One request as the source of indexer::score_block.
template <class A>
struct Request {
  const PagedIndexerLogitsArgs& a;
  std::int64_t b;
  std::int64_t heads = a.q.size(2), d = a.q.size(3), page_size = a.cache.size(1), max_len = a.logits.size(2);
  DType q_dtype = a.q.dtype, k_dtype = element_size(a.cache.dtype) == 1 ? DType::float8_e4m3fn : a.cache.dtype;

  const void* q(std::int64_t i, std::int64_t h) const {
    const std::int64_t offset = b * a.q.stride[0] + i * a.q.stride[1] + h * a.q.stride[2];
    return a.q.as<const char>() + offset * element_size(q_dtype);
  }
  const A* weights(std::int64_t i) const {
    return a.weights.as<const A>() + b * a.weights.stride[0] + i * a.weights.stride[1];
  }
  KeyRange range(std::int64_t i) const {
    const std::int64_t length =
        a.context_lens.as<const std::int32_t>()[b * a.context_lens.stride[0] + i * a.context_lens.stride[1]];
    return {0, std::clamp<std::int64_t>(length, 0, std::min(max_len, a.block_table.size(1) * page_size))};
  }
  Key k(std::int64_t j) const {
    const std::int64_t page = a.block_table.as<const std::int32_t>()[b * a.block_table.stride[0] + j / page_size];
    if (page < 0 || page >= a.cache.size(0)) return {.exists = false};
    const std::int64_t entry = j % page_size;
    const char* const begin = a.cache.as<const char>() + page * a.cache.stride[0] * element_size(a.cache.dtype);
    if (k_dtype != DType::float8_e4m3fn) return {begin + entry * a.cache.stride[1] * element_size(k_dtype)};
    float scale;  // may stand at any byte
    std::memcpy(&scale, begin + page_size * d + entry * sizeof scale, sizeof scale);
    return {begin + entry * d, scale};
  }
  A* logits(std::int64_t i) const { return a.logits.as<A>() + (b * a.q.size(1) + i) * max_len; }
};

template <class A>
void forward(const PagedIndexerLogitsArgs& a) {
  const std::int64_t s_q = a.q.size(1), max_len = a.logits.size(2), queries = indexer::block_queries(a.q.size(2));
  const std::int64_t query_blocks = (s_q + queries - 1) / queries;
  const std::int64_t key_blocks = (max_len + indexer::kBlockKeys - 1) / indexer::kBlockKeys;
  const std::int64_t units = a.q.size(0) * query_blocks * key_blocks;
  parallel_for(0, units, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const Request<A> request{a, unit / (query_blocks * key_blocks)};
      const std::int64_t i = unit / key_blocks % query_blocks * queries, j = unit % key_blocks * indexer::kBlockKeys;
      indexer::score_block<A>(request, i, std::min(i + queries, s_q), j, std::min(j + indexer::kBlockKeys, max_len));
    }
  });
}

}  // namespace

void paged_indexer_logits_cpu(const PagedIndexerLogitsArgs& args, const Launch&) {
  args.q.dtype == DType::float64 ? forward<double>(args) : forward<float>(args);
}

}  // namespace dsm
