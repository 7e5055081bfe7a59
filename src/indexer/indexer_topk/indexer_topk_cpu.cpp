// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <algorithm>
#include <limits>
#include <vector>

#include "src/core/parallel_for.h"
#include "src/indexer/indexer_topk/indexer_topk.h"
#include "src/indexer/key_range.h"
#include "src/numerics/float_format.h"

namespace dsm {
namespace {

// Rows whose elements add up to about this many go to one thread at a time.
constexpr std::int64_t kGrainElements = 16384;

/// An integer that orders like the logit, 0 for those that are never selected. Zeros are equal.
std::uint32_t rank_of(float logit) {
  const std::uint32_t bits = bits_of(logit + 0.0f);
  const std::uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return logit > -std::numeric_limits<float>::infinity() ? ordered : 0;
}

/// What is selected: every rank above `rank`, and the first `ties` that equal it.
struct Cut {
  std::uint32_t rank;
  std::int64_t ties;
};

/// The cut that selects k <= n ranks, found digit by digit from the top: each pass counts the digits of the ranks that
/// agree with what is known of the cut. Takes the same three passes whatever the ranks are.
Cut cut_of(const std::uint32_t* ranks, std::int64_t n, std::int64_t k) {
  constexpr struct {
    int shift, bits;
  } kDigits[] = {{21, 11}, {10, 11}, {0, 10}};
  Cut cut{0, k};
  std::uint32_t known = 0;
  for (const auto& [shift, bits] : kDigits) {
    const std::uint32_t mask = (1u << bits) - 1;
    std::int64_t count[1 << 11] = {};
    for (std::int64_t i = 0; i < n; ++i)
      if ((ranks[i] & known) == cut.rank) ++count[ranks[i] >> shift & mask];
    std::uint32_t digit = mask;
    for (; cut.ties > count[digit]; --digit) cut.ties -= count[digit];
    cut.rank |= digit << shift;
    known |= mask << shift;
  }
  return cut;
}

void select_row(const float* logits, std::int64_t first, std::int64_t n, std::int64_t topk,
                std::vector<std::uint32_t>& ranks, std::int32_t* indices) {
  ranks.resize(n);
  std::int64_t candidates = 0, selected = 0;
  for (std::int64_t i = 0; i < n; ++i) ranks[i] = rank_of(logits[i]);
  for (std::int64_t i = 0; i < n; ++i) candidates += ranks[i] != 0;
  Cut cut = candidates > topk ? cut_of(ranks.data(), n, topk) : Cut{0, 0};
  for (std::int64_t i = 0; i < n && selected < topk; ++i) {
    if (ranks[i] > cut.rank || (ranks[i] == cut.rank && cut.ties-- > 0))
      indices[selected++] = static_cast<std::int32_t>(first + i);
  }
  std::fill(indices + selected, indices + topk, -1);
}

}  // namespace

void indexer_topk_cpu(const IndexerTopkArgs& a, const Launch&) {
  const std::int64_t n = a.logits.size(1), topk = a.indices.size(1);
  const std::int64_t grain = std::max<std::int64_t>(1, kGrainElements / std::max<std::int64_t>(1, n));
  parallel_for(0, a.logits.size(0), grain, [&](std::int64_t begin, std::int64_t end) {
    std::vector<std::uint32_t> ranks;
    for (std::int64_t row = begin; row < end; ++row) {
      const indexer::KeyRange range = indexer::key_range(a.starts, a.ends, row, n);
      const float* const logits = a.logits.as<const float>() + row * a.logits.stride[0] + range.begin;
      select_row(logits, range.begin, range.end - range.begin, topk, ranks, a.indices.as<std::int32_t>() + row * topk);
    }
  });
}

}  // namespace dsm
