// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "dsm/block_scales.h"
#include "dsm/export.h"
#include "dsm/launch.h"
#include "dsm/tensor_view.h"

// Mixture of experts: every token visits `topk` of `experts` small feed-forward networks, and a gate says which and how
// much each counts. A (token, slot) pair, slot in [0, topk), is one visit.
//
// Unfused: moe_gate -> moe_permute -> grouped_gemm -> swiglu -> grouped_gemm -> moe_combine. Fused: moe_gate ->
// moe_ffn. Both add a token's visits up in float32 (float64 for float64) by increasing expert, the shared expert last,
// as the DeepSeek-V4 reference code does; on CPU their forward results are the same bits in float32 and float64.
//
// Weights may be quantised (BlockScales): then the codes stand where the matrix would, products are taken with the
// exact numbers, and the weights have no gradient. Activations are taken as they come or rounded to FP8
// (ActivationFormat); their gradients pass that rounding as if it were not there (straight through), those of floating
// weights are taken with the rounded activations.
//
// "floating" below is float64|float32|float16|bfloat16, one dtype for all floating tensors of a call, and "wide" is
// float32, or float64 where that dtype is float64. Products are accumulated in wide and rounded once.
namespace dsm {

/// How a gate turns a logit v into a score.
enum class Scoring : std::uint8_t {
  softmax,       ///< exp(v) / Σ exp over all experts
  sigmoid,       ///< 1 / (1 + exp(-v)); DeepSeek-V3
  sqrtsoftplus,  ///< sqrt(log(1 + exp(v))); DeepSeek-V4
};

/// Over which of a token's slots the weights add up to routed_scaling_factor.
enum class Normalize : std::uint8_t {
  none,      ///< weight = score · routed_scaling_factor
  selected,  ///< divided by the sum over the selected experts (+ 1e-20), whether or not capacity drops some
  kept,      ///< divided by the sum over those that capacity keeps (+ 1e-20)
};

/// Routing. Per token, with score s_e and selection value s_e + bias_e:
///
///   1. n_group > 1: experts form n_group equal groups of neighbours; a group's value is the sum of its two largest
///      selection values; only experts of the topk_group best groups can be selected.
///   2. The topk largest selection values are selected, in decreasing order. With token_ids and tid2eid instead the
///      token's row of the table is, in its order (hash routing; bias and groups do not apply).
///   3. capacity_rows >= 0: each expert keeps its first capacity_rows pairs by token, then slot; the others are
///   dropped.
///   4. weights = s_e (without bias), normalised as said above, times routed_scaling_factor; 0 where dropped.
///
/// Equal values: the smaller expert (or group) index first. A logit that is NaN or +inf, and for softmax a row of -inf
/// alone, is refused on CPU, and so is an id out of its range; on CUDA, where a kernel cannot refuse, that row's
/// weights are NaN (0 where dropped) and its indices valid. Sources: DeepSeek-V3 and -V4 reference gates; capacity as
/// in GShard (arXiv 2006.16668).
struct MoeGateArgs {
  TensorView logits{};     ///< [tokens, experts] float32|float64, rows any distance apart
  TensorView bias{};       ///< [experts] float32, finite or -inf; absent: 0
  TensorView token_ids{};  ///< [tokens] int64 in [0, vocab); present exactly when tid2eid is
  TensorView tid2eid{};    ///< [vocab, topk] int32|int64 in [0, experts)
  Scoring scoring = Scoring::softmax;
  Normalize normalize = Normalize::selected;
  double routed_scaling_factor = 1;
  std::int64_t n_group = 1, topk_group = 1;
  std::int64_t capacity_rows = -1;  ///< -1: no limit
  TensorView weights{};             ///< out [tokens, topk] logits' dtype
  TensorView indices{};             ///< out [tokens, topk] int32: expert, or -1 - expert where dropped
};
DSM_API void moe_gate(const MoeGateArgs& args, const Launch& launch = {});
DSM_API std::size_t moe_gate_workspace(const MoeGateArgs& args);

/// dlogits of moe_gate: the derivative of what it computes, through scores and both normalisations; the choice of
/// experts has none. A dropped pair's weight is the constant 0, yet under Normalize::selected its score is part of the
/// sum and gets its gradient from there.
struct MoeGateBackwardArgs {
  TensorView dweights{};  ///< [tokens, topk] logits' dtype, contiguous
  TensorView logits{};    ///< as in the forward call
  TensorView indices{};   ///< [tokens, topk] as returned by the forward call
  Scoring scoring = Scoring::softmax;
  Normalize normalize = Normalize::selected;
  double routed_scaling_factor = 1;
  TensorView dlogits{};  ///< out [tokens, experts] logits' dtype
};
DSM_API void moe_gate_backward(const MoeGateBackwardArgs& args, const Launch& launch = {});

/// Sorts the kept (token, slot) pairs by expert, inside an expert by token, then slot, and copies the tokens' rows.
///
///   row_of_slot[token, slot] = the pair's place in that order, -1 where dropped
///   slot_of_row[row] = token · topk + slot, -1 behind the last kept pair
///   rows[row] = x[token], 0 behind the last kept pair
///   expert e has the rows [expert_offsets[e], expert_offsets[e + 1])
///
/// The derivative of `rows` by x is moe_combine without weights. Without x (and rows) only the plan is made.
struct MoePermuteArgs {
  TensorView x{};               ///< [tokens, hidden] floating, rows any distance apart; absent: plan only
  TensorView indices{};         ///< [tokens, topk] int32 < experts; negative: dropped
  TensorView rows{};            ///< out [tokens * topk, hidden]; present exactly when x is
  TensorView expert_offsets{};  ///< out [experts + 1] int32
  TensorView row_of_slot{};     ///< out [tokens, topk] int32
  TensorView slot_of_row{};     ///< out [tokens * topk] int32
};
DSM_API void moe_permute(const MoePermuteArgs& args, const Launch& launch = {});

/// c[row] = a[row] · b[e]ᵀ for the rows [expert_offsets[e], expert_offsets[e + 1]) of each expert e (a[row] · b[e] when
/// transpose_b is false), 0 behind the last expert's rows, whatever a holds there.
struct GroupedGemmArgs {
  TensorView a{};               ///< [rows, k] floating, rows any distance apart
  TensorView b{};               ///< [experts, n, k], or [experts, k, n] when transpose_b is false; contiguous
  BlockScales b_scales{};       ///< of quantised b, which must be [experts, n, k]
  TensorView expert_offsets{};  ///< [experts + 1] int32, from 0, not decreasing, at most rows
  bool transpose_b = true;
  ActivationFormat activation_format = ActivationFormat::none;  ///< of a
  TensorView c{};                                               ///< out [rows, n]
};
DSM_API void grouped_gemm(const GroupedGemmArgs& args, const Launch& launch = {});

/// da[row] = dc[row] · b[e], db[e] = Σ_rows dc[row]ᵀ a[row] (transposed accordingly when transpose_b is false); da is 0
/// behind the last expert's rows and db 0 for an expert without rows.
struct GroupedGemmBackwardArgs {
  TensorView dc{};              ///< [rows, n], rows any distance apart
  TensorView a{};               ///< as in the forward call
  TensorView b{};               ///< as in the forward call
  BlockScales b_scales{};       ///< as in the forward call
  TensorView expert_offsets{};  ///< as in the forward call
  bool transpose_b = true;
  ActivationFormat activation_format = ActivationFormat::none;  ///< as in the forward call
  TensorView da{};                                              ///< out [rows, k]; absent: not computed
  TensorView db{};  ///< out, b's shape; absent: not computed, as it must be for quantised b
};
DSM_API void grouped_gemm_backward(const GroupedGemmBackwardArgs& args, const Launch& launch = {});

/// y = silu(min(g, limit)) · clamp(u, -limit, limit) with z = [g | u] and silu(v) = v / (1 + exp(-v)), in wide.
/// Source: Shazeer 2020 (arXiv 2002.05202); the limit is DeepSeek-V4's.
struct SwigluArgs {
  TensorView z{};  ///< [rows, 2 * intermediate] floating, rows any distance apart
  double limit = std::numeric_limits<double>::infinity();  ///< > 0
  TensorView y{};                                          ///< out [rows, intermediate]
};
DSM_API void swiglu(const SwigluArgs& args, const Launch& launch = {});

/// dz of swiglu: 0 where g or u lies beyond the limit (at the limit itself the derivative from inside).
struct SwigluBackwardArgs {
  TensorView dy{};  ///< [rows, intermediate], rows any distance apart
  TensorView z{};   ///< as in the forward call
  double limit = std::numeric_limits<double>::infinity();
  TensorView dz{};  ///< out [rows, 2 * intermediate]
};
DSM_API void swiglu_backward(const SwigluBackwardArgs& args, const Launch& launch = {});

/// y[token] = Σ_slot weights[token, slot] · rows[row_of_slot[token, slot]] + shared[token] in wide, by increasing row
/// (so by increasing expert), the shared expert last. Rows that no slot names are not read.
struct MoeCombineArgs {
  TensorView rows{};         ///< [rows, hidden] floating, contiguous
  TensorView row_of_slot{};  ///< [tokens, topk] int32 < rows; negative: the slot adds nothing
  TensorView weights{};      ///< [tokens, topk] wide; absent: 1
  TensorView shared{};       ///< [tokens, hidden]; absent: 0
  TensorView y{};            ///< out [tokens, hidden]
};
DSM_API void moe_combine(const MoeCombineArgs& args, const Launch& launch = {});

/// drows[row] = weights[token, slot] · dy[token], 0 for a row that no slot names; dweights[token, slot] =
/// dy[token] · rows[row], 0 where dropped. dshared is dy itself.
struct MoeCombineBackwardArgs {
  TensorView dy{};           ///< [tokens, hidden], contiguous
  TensorView rows{};         ///< as in the forward call
  TensorView row_of_slot{};  ///< as in the forward call, naming no row twice
  TensorView weights{};      ///< as in the forward call
  TensorView drows{};        ///< out [rows, hidden]
  TensorView dweights{};     ///< out [tokens, topk] wide; absent exactly when weights is
};
DSM_API void moe_combine_backward(const MoeCombineBackwardArgs& args, const Launch& launch = {});

/// The experts as one operator, tile by tile; no permuted x or y is ever made:
///
///   z[row] = x[token] · w13[e]ᵀ,   y[token] = Σ_pairs weights[pair] · swiglu(z[row]) · w2[e]ᵀ  (+ the shared expert)
///
/// with rows in moe_permute's order. The shared expert is visited by every token with weight 1. z is rounded only where
/// it is stored; the forward result comes from the unrounded values.
///
/// With activation_format fp8 the roundings are those of the DeepSeek-V4 reference code. R rounds to x's dtype, and Q
/// is ActivationFormat::fp8, in groups along hidden or intermediate:
///
///   z[row] = R(Q(x[token]) · w13[e]ᵀ),   y[token] = R(Σ_pairs R(Q(R(weights[pair] · swiglu(z[row]))) · w2[e]ᵀ))
///
/// so the routing weight comes before the second rounding to FP8, and z is what is stored. swiglu, its product with the
/// weight and the sums are in wide.
struct MoeFfnArgs {
  TensorView x{};           ///< [tokens, hidden] floating, rows any distance apart
  TensorView weights{};     ///< [tokens, topk] wide, contiguous
  TensorView indices{};     ///< [tokens, topk] int32 < experts, contiguous; negative: dropped
  TensorView w13{};         ///< [experts, 2 * intermediate, hidden]: gate rows, then up rows; contiguous
  TensorView w2{};          ///< [experts, hidden, intermediate], contiguous
  TensorView shared_w13{};  ///< [2 * shared_intermediate, hidden], contiguous; absent: no shared expert
  TensorView shared_w2{};   ///< [hidden, shared_intermediate], contiguous; present exactly when shared_w13 is
  BlockScales w13_scales{}, w2_scales{}, shared_w13_scales{}, shared_w2_scales{};  ///< of those that are quantised
  double swiglu_limit = std::numeric_limits<double>::infinity();                   ///< > 0
  ActivationFormat activation_format = ActivationFormat::none;
  TensorView y{};         ///< out [tokens, hidden]
  TensorView z{};         ///< out [tokens * topk, 2 * intermediate] for the backward pass, 0 behind the last kept pair;
                          ///< absent: not kept
  TensorView shared_z{};  ///< out [tokens, 2 * shared_intermediate]; present exactly when z and shared_w13 are
};
DSM_API void moe_ffn(const MoeFfnArgs& args, const Launch& launch = {});

/// Gradients of moe_ffn from x, z and the routing alone. With a = swiglu(z), s the pair's weight, da = dy[token] ·
/// w2[e] and dz = swiglu'(z) applied to s · da:
///
///   dweights[pair] = a · da,   dx[token] = Σ_pairs dz · w13[e],   dw13[e] = Σ_rows dzᵀ x[token],
///   dw2[e] = Σ_rows dy[token]ᵀ (s · a)
///
/// so neither y's rows nor their gradients are needed (SonicMoE, arXiv 2512.14080). Dropped pairs get 0. With
/// activation_format fp8, dw13 is taken with Q(x[token]) and dw2 with Q(R(s · a)).
struct MoeFfnBackwardArgs {
  TensorView dy{};  ///< [tokens, hidden], rows any distance apart
  TensorView x{};   ///< this and the next ones as in the forward call
  TensorView weights{};
  TensorView indices{};
  TensorView w13{};
  TensorView w2{};
  TensorView shared_w13{};
  TensorView shared_w2{};
  BlockScales w13_scales{}, w2_scales{}, shared_w13_scales{}, shared_w2_scales{};
  double swiglu_limit = std::numeric_limits<double>::infinity();
  ActivationFormat activation_format = ActivationFormat::none;
  TensorView z{};            ///< as returned by the forward call
  TensorView shared_z{};     ///< as returned by the forward call
  TensorView dx{};           ///< out [tokens, hidden]
  TensorView dweights{};     ///< out [tokens, topk] wide
  TensorView dw13{};         ///< out, as w13; absent: not computed, as it must be for quantised w13
  TensorView dw2{};          ///< out, as w2; present exactly when dw13 is
  TensorView dshared_w13{};  ///< out, as shared_w13; absent: not computed
  TensorView dshared_w2{};   ///< out, as shared_w2; present exactly when dshared_w13 is
};
DSM_API void moe_ffn_backward(const MoeFfnBackwardArgs& args, const Launch& launch = {});

}  // namespace dsm
