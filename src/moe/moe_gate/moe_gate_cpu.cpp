// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <algorithm>
#include <atomic>
#include <limits>
#include <string>
#include <vector>

#include "src/core/checks.h"
#include "src/core/parallel_for.h"
#include "src/cpu/vector_math.h"
#include "src/moe/moe_gate/moe_gate.h"
#include "src/numerics/scoring.h"

namespace dsm {
namespace {

// Rows whose logits add up to about this many go to one thread at a time.
constexpr std::int64_t kGrainLogits = 8192;

std::int64_t token_grain(std::int64_t experts) { return std::max<std::int64_t>(1, kGrainLogits / experts); }

std::int32_t expert_of(std::int32_t index) { return index < 0 ? -1 - index : index; }

std::int64_t integer_at(const TensorView& tensor, std::int64_t i) {
  return tensor.dtype == DType::int32 ? tensor.as<const std::int32_t>()[i] : tensor.as<const std::int64_t>()[i];
}

/// scores may be logits, but for softmax.
template <class T>
void compute_scores(const T* logits, std::int64_t experts, Scoring scoring, T* scores) {
  switch (scoring) {
    case Scoring::softmax: {
      std::copy_n(logits, experts, scores);
      const T sum = cpu::exp_scaled(scores, experts, T(1), cpu::max(logits, experts));
      for (std::int64_t e = 0; e < experts; ++e) scores[e] /= sum;
      break;
    }
    case Scoring::sigmoid:
      cpu::sigmoid(logits, experts, scores);
      break;
    case Scoring::sqrtsoftplus:
      for (std::int64_t e = 0; e < experts; ++e) scores[e] = sqrt_softplus(logits[e]);
  }
}

/// The k largest of the values offered, in decreasing order; of equal ones the one offered first comes first.
template <class T>
class Largest {
 public:
  explicit Largest(std::int64_t k) : values_(k), ids_(k) {}

  void clear() { size_ = 0; }

  void offer(T value, std::int32_t id) {
    const std::size_t capacity = values_.size();
    if (size_ == capacity && !(value > values_[capacity - 1])) return;
    if (size_ < capacity) ++size_;
    std::size_t at = size_ - 1;
    for (; at > 0 && value > values_[at - 1]; --at) {
      values_[at] = values_[at - 1];
      ids_[at] = ids_[at - 1];
    }
    values_[at] = value;
    ids_[at] = id;
  }

  const std::vector<std::int32_t>& ids() const { return ids_; }

 private:
  std::vector<T> values_;
  std::vector<std::int32_t> ids_;
  std::size_t size_ = 0;
};

/// Selects experts by value, token after token, with its scratch kept in between.
template <class T>
class Selector {
 public:
  explicit Selector(const MoeGateArgs& a)
      : experts_(a.logits.size(1)), n_group_(a.n_group), groups_(a.topk_group), best_(a.weights.size(1)) {
    if (a.bias) bias_ = a.bias.as<const float>();
  }

  void select(const T* scores, std::int32_t* indices) {
    const std::int64_t group_size = experts_ / n_group_;
    groups_.clear();
    for (std::int64_t g = 0; g < n_group_; ++g) groups_.offer(group_value(scores, g, group_size), static_cast<int>(g));
    std::vector<std::int32_t> groups = groups_.ids();
    std::sort(groups.begin(), groups.end());  // offered by increasing expert, equal experts stay in that order
    best_.clear();
    for (const std::int64_t g : groups)
      for (std::int64_t e = g * group_size; e < (g + 1) * group_size; ++e)
        best_.offer(value(scores, e), static_cast<std::int32_t>(e));
    std::copy(best_.ids().begin(), best_.ids().end(), indices);
  }

 private:
  T value(const T* scores, std::int64_t e) const { return bias_ ? scores[e] + static_cast<T>(bias_[e]) : scores[e]; }

  T group_value(const T* scores, std::int64_t group, std::int64_t size) const {
    if (n_group_ == 1) return 0;
    constexpr T kNone = -std::numeric_limits<T>::infinity();
    T first = kNone, second = kNone;
    for (std::int64_t e = group * size; e < (group + 1) * size; ++e) {
      const T v = value(scores, e);
      second = std::max(second, std::min(first, v));
      first = std::max(first, v);
    }
    return size == 1 ? first : first + second;
  }

  std::int64_t experts_, n_group_;
  const float* bias_ = nullptr;
  Largest<T> groups_, best_;
};

/// Refuses what has no order or no score before anything is written.
template <class T>
void check_values(const MoeGateArgs& a) {
  const Check check("moe_gate");
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  const std::int64_t tokens = a.logits.size(0), experts = a.logits.size(1);
  std::atomic<std::int64_t> bad_row = tokens;
  parallel_for(0, tokens, token_grain(experts), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      const T* logits = a.logits.as<const T>() + t * a.logits.stride[0];
      const bool ordered = std::all_of(logits, logits + experts, [=](T v) { return v < kInfinity; });
      const bool scored = a.scoring != Scoring::softmax || cpu::max(logits, experts) > -kInfinity;
      if (ordered && scored) continue;
      for (std::int64_t seen = bad_row; t < seen && !bad_row.compare_exchange_weak(seen, t);) {
      }
    }
  });
  if (bad_row < tokens)
    check.fail("logits",
               a.scoring == Scoring::softmax ? "below +inf, not NaN and not all -inf" : "below +inf and not NaN",
               "another value in row " + std::to_string(bad_row));
  for (std::int64_t e = 0; a.bias && e < experts; ++e) {
    const float bias = a.bias.as<const float>()[e];
    check.that(bias < std::numeric_limits<float>::infinity(), "bias", "below +inf and not NaN",
               std::to_string(bias) + " for expert " + std::to_string(e));
  }
  if (!a.tid2eid) return;
  const std::int64_t vocab = a.tid2eid.size(0), topk = a.tid2eid.size(1);
  for (std::int64_t t = 0; t < tokens; ++t) {
    const std::int64_t id = a.token_ids.as<const std::int64_t>()[t];
    check.that(id >= 0 && id < vocab, "token_ids", "from 0 to vocab - 1 = " + std::to_string(vocab - 1), id);
    for (std::int64_t k = 0; k < topk; ++k) {
      const std::int64_t e = integer_at(a.tid2eid, id * topk + k);
      check.that(e >= 0 && e < experts, "tid2eid", "from 0 to experts - 1 = " + std::to_string(experts - 1), e);
    }
  }
}

/// Turns the index of every pair beyond an expert's capacity into -1 - expert.
void drop_beyond_capacity(const MoeGateArgs& a) {
  std::vector<std::int64_t> taken(a.logits.size(1));
  std::int32_t* indices = a.indices.as<std::int32_t>();
  for (std::int64_t i = 0; i < a.indices.numel(); ++i)
    if (taken[indices[i]]++ >= a.capacity_rows) indices[i] = -1 - indices[i];
}

/// Σ of the scores that one token's weights are divided by, 1 when they are not normalised.
template <class T>
T divisor(const T* scores, const std::int32_t* indices, std::int64_t topk, Normalize normalize) {
  if (normalize == Normalize::none) return 1;
  T sum = static_cast<T>(kGateEpsilon);
  for (std::int64_t k = 0; k < topk; ++k)
    if (indices[k] >= 0 || normalize == Normalize::selected) sum += scores[k];
  return sum;
}

template <class T>
void forward(const MoeGateArgs& a) {
  check_values<T>(a);
  const std::int64_t tokens = a.logits.size(0), experts = a.logits.size(1), topk = a.weights.size(1);
  T* weights = a.weights.as<T>();
  std::int32_t* indices = a.indices.as<std::int32_t>();
  parallel_for(0, tokens, token_grain(experts), [&](std::int64_t begin, std::int64_t end) {
    Selector<T> selector(a);
    std::vector<T> scores(experts);
    for (std::int64_t t = begin; t < end; ++t) {
      std::int32_t* selected = indices + t * topk;
      compute_scores(a.logits.as<const T>() + t * a.logits.stride[0], experts, a.scoring, scores.data());
      if (a.tid2eid) {
        const std::int64_t row = a.token_ids.as<const std::int64_t>()[t] * topk;
        for (std::int64_t k = 0; k < topk; ++k) selected[k] = static_cast<std::int32_t>(integer_at(a.tid2eid, row + k));
      } else {
        selector.select(scores.data(), selected);
      }
      for (std::int64_t k = 0; k < topk; ++k) weights[t * topk + k] = scores[selected[k]];
    }
  });
  if (a.capacity_rows >= 0) drop_beyond_capacity(a);
  const T factor = static_cast<T>(a.routed_scaling_factor);
  for (std::int64_t t = 0; t < tokens; ++t) {
    T* w = weights + t * topk;
    const T sum = divisor(w, indices + t * topk, topk, a.normalize);
    for (std::int64_t k = 0; k < topk; ++k) w[k] = indices[t * topk + k] < 0 ? 0 : w[k] / sum * factor;
  }
}

template <class T>
T score_derivative(T logit, Scoring scoring) {
  return scoring == Scoring::sigmoid ? sigmoid_derivative(logit) : sqrt_softplus_derivative(logit);
}

/// ds[k] of the selected scores s[k], from dweights.
template <class T>
void score_gradients(const MoeGateBackwardArgs& a, const T* dweights, const std::int32_t* indices, const T* s,
                     std::int64_t topk, T* ds) {
  const T factor = static_cast<T>(a.routed_scaling_factor);
  const T sum = divisor(s, indices, topk, a.normalize);
  T pull = 0;  // of the divisor on every score in it
  for (std::int64_t k = 0; k < topk; ++k) {
    ds[k] = indices[k] < 0 ? 0 : dweights[k] * factor / sum;
    pull += ds[k] * (s[k] / sum);
  }
  if (a.normalize == Normalize::none) return;
  for (std::int64_t k = 0; k < topk; ++k)
    if (indices[k] >= 0 || a.normalize == Normalize::selected) ds[k] -= pull;
}

template <class T>
void backward(const MoeGateBackwardArgs& a) {
  const std::int64_t tokens = a.logits.size(0), experts = a.logits.size(1), topk = a.indices.size(1);
  const std::int32_t* all_indices = a.indices.as<const std::int32_t>();
  for (std::int64_t i = 0; i < tokens * topk; ++i)
    Check("moe_gate_backward")
        .that(expert_of(all_indices[i]) < experts, "indices", "experts below " + std::to_string(experts),
              all_indices[i]);
  parallel_for(0, tokens, token_grain(experts), [&](std::int64_t begin, std::int64_t end) {
    std::vector<T> scores(experts), s(topk), ds(topk);
    for (std::int64_t t = begin; t < end; ++t) {
      const T* logits = a.logits.as<const T>() + t * a.logits.stride[0];
      const std::int32_t* indices = all_indices + t * topk;
      T* dlogits = a.dlogits.as<T>() + t * experts;
      const bool over_all = a.scoring == Scoring::softmax;
      if (over_all) compute_scores(logits, experts, a.scoring, scores.data());
      for (std::int64_t k = 0; k < topk; ++k) s[k] = (over_all ? scores.data() : logits)[expert_of(indices[k])];
      if (!over_all) compute_scores(s.data(), topk, a.scoring, s.data());
      score_gradients(a, a.dweights.as<const T>() + t * topk, indices, s.data(), topk, ds.data());
      T pull = 0;  // softmax: of the sum over all experts
      for (std::int64_t k = 0; over_all && k < topk; ++k) pull += ds[k] * s[k];
      for (std::int64_t e = 0; e < experts; ++e) dlogits[e] = over_all ? -pull * scores[e] : 0;
      for (std::int64_t k = 0; k < topk; ++k) {
        const std::int32_t e = expert_of(indices[k]);
        dlogits[e] += ds[k] * (over_all ? s[k] : score_derivative(logits[e], a.scoring));
      }
    }
  });
}

}  // namespace

void moe_gate_cpu(const MoeGateArgs& args, const Launch&) {
  args.logits.dtype == DType::float64 ? forward<double>(args) : forward<float>(args);
}

void moe_gate_backward_cpu(const MoeGateBackwardArgs& args, const Launch&) {
  args.logits.dtype == DType::float64 ? backward<double>(args) : backward<float>(args);
}

}  // namespace dsm
