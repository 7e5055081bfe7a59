// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <vector>

#include "src/core/parallel_for.h"
#include "src/cpu/lane_sum.h"
#include "src/cpu/vector_math.h"
#include "src/indexer/indexer_kl_loss/indexer_kl_loss.h"
#include "src/numerics/softmax_merge.h"

namespace dsm {
namespace {

// Rows whose slots add up to about this many go to one thread at a time.
constexpr std::int64_t kGrainSlots = 4096;

/// The keys of one row without gaps.
template <class A>
struct Row {
  std::vector<std::int64_t> key;
  std::vector<A> shifted;  ///< logits minus their maximum
  std::vector<A> weight;   ///< e^shifted
  std::vector<A> target;
  A weights, targets;  ///< sums

  /// False when the row's loss is 0 by definition.
  template <class Args>
  bool gather(const Args& a, std::int64_t row) {
    const std::int64_t n = a.logits.size(1), slots = a.target.size(1);
    const A* const logits = a.logits.template as<const A>() + row * a.logits.stride[0];
    const A* const given = a.target.template as<const A>() + row * a.target.stride[0];
    const std::int32_t* const indices =
        a.indices ? a.indices.template as<const std::int32_t>() + row * a.indices.stride[0] : nullptr;
    key.resize(slots);
    shifted.resize(slots);
    target.resize(slots);
    std::int64_t count = 0;
    for (std::int64_t s = 0; s < slots; ++s) {
      const std::int64_t j = indices ? indices[s] : s;
      if (j < 0 || j >= n || logits[j] == -kInfinity<A>) continue;
      key[count] = j;
      shifted[count] = logits[j];
      target[count++] = given[s];
    }
    key.resize(count);
    shifted.resize(count);
    target.resize(count);
    const A max = cpu::max(shifted.data(), count);
    for (A& x : shifted) x -= max;
    weight = shifted;
    weights = cpu::exp_scaled(weight.data(), count, A(1), A(0));
    targets = cpu::sum(target.data(), count);
    return count > 0 && targets != A(0);
  }

  /// Σ p (log p − log softmax)
  A loss() const {
    const A normalise = std::log(targets) - std::log(weights);
    return cpu::lane_sum<A>(static_cast<std::int64_t>(key.size()), [&](std::int64_t s) {
      if (target[s] == A(0)) return A(0);
      return target[s] / targets * (std::log(target[s]) - shifted[s] - normalise);
    });
  }
};

/// Calls body(gathered row, index of the row) for every row; `gathered` is false where the loss is 0 by definition.
template <class A, class Args, class Body>
void over_rows(const Args& a, const Body& body) {
  const std::int64_t grain = std::max<std::int64_t>(1, kGrainSlots / std::max<std::int64_t>(1, a.target.size(1)));
  parallel_for(0, a.logits.size(0), grain, [&](std::int64_t begin, std::int64_t end) {
    Row<A> row;
    for (std::int64_t i = begin; i < end; ++i) {
      const bool gathered = row.gather(a, i);
      body(row, i, gathered);
    }
  });
}

template <class A>
void forward(const IndexerKlLossArgs& a) {
  over_rows<A>(
      a, [&](const Row<A>& row, std::int64_t i, bool gathered) { a.loss.as<A>()[i] = gathered ? row.loss() : A(0); });
}

template <class A>
void backward(const IndexerKlLossBackwardArgs& a) {
  const std::int64_t n = a.logits.size(1);
  over_rows<A>(a, [&](const Row<A>& row, std::int64_t i, bool gathered) {
    A* const dlogits = a.dlogits.as<A>() + i * n;
    std::fill_n(dlogits, n, A(0));
    if (!gathered) return;
    const A dloss = a.dloss.as<const A>()[i];
    const A by_weights = A(1) / row.weights, by_targets = A(1) / row.targets;
    for (std::size_t s = 0; s < row.key.size(); ++s)
      dlogits[row.key[s]] += dloss * (row.weight[s] * by_weights - row.target[s] * by_targets);
  });
}

}  // namespace

void indexer_kl_loss_cpu(const IndexerKlLossArgs& args, const Launch&) {
  args.logits.dtype == DType::float64 ? forward<double>(args) : forward<float>(args);
}

void indexer_kl_loss_backward_cpu(const IndexerKlLossBackwardArgs& args, const Launch&) {
  args.logits.dtype == DType::float64 ? backward<double>(args) : backward<float>(args);
}

}  // namespace dsm
