// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "dsm/mla.h"

#include <string>
#include <tuple>

#include "bindings/torch/convert.h"
#include "dsm/error.h"

namespace dsm::binding {
namespace {

using OptionalTensor = std::optional<Tensor>;

// The shapes of outputs follow from the inputs' before the operator has checked those.
void expect_rank(const char* operation, const char* argument, const Tensor& tensor, const char* shape_text, int rank) {
  if (tensor.dim() != rank) throw Error(operation, argument, shape_text, describe(view(tensor)));
}

/// The output for q [batch, s_q, h_q, d_qk].
Tensor empty_out(const char* operation, const Tensor& q, std::int64_t d_v) {
  expect_rank(operation, "q", q, "[batch, s_q, h_q, d_qk]", 4);
  if (d_v < 0) throw Error(operation, "d_v", "at least 0", std::to_string(d_v));
  return empty(q, {q.size(0), q.size(1), q.size(2), d_v}, q.scalar_type());
}

Tensor mla_decode_out(const Tensor& q, const Tensor& k_cache, const Tensor& block_table, const Tensor& cache_seqlens,
                      double softmax_scale, bool causal, const OptionalTensor& k_scale, bool batch_invariant,
                      Tensor out) {
  expect_rank("mla_decode", "q", q, "[batch, s_q, h_q, d_qk]", 4);
  Tensor lse = empty(q, {q.size(0), q.size(2), q.size(1)}, accumulator_dtype(q));
  const MlaDecodeArgs args{.q = view(q),
                           .k_cache = view(k_cache),
                           .block_table = view(block_table),
                           .cache_seqlens = view(cache_seqlens),
                           .k_scale = view(k_scale),
                           .softmax_scale = softmax_scale,
                           .causal = causal,
                           .batch_invariant = batch_invariant,
                           .out = view(out),
                           .lse = view(lse)};
  Call call(q, mla_decode_workspace, args);
  dsm::mla_decode(args, call.launch());
  return lse;
}

std::tuple<Tensor, Tensor> mla_decode(const Tensor& q, const Tensor& k_cache, const Tensor& block_table,
                                      const Tensor& cache_seqlens, double softmax_scale, bool causal,
                                      const OptionalTensor& k_scale, bool batch_invariant, std::int64_t d_v) {
  Tensor out = empty_out("mla_decode", q, d_v);
  Tensor lse =
      mla_decode_out(q, k_cache, block_table, cache_seqlens, softmax_scale, causal, k_scale, batch_invariant, out);
  return {out, lse};
}

Tensor sparse_mla_decode_out(const Tensor& q, const Tensor& k_cache, const Tensor& indices,
                             const OptionalTensor& topk_length, const OptionalTensor& extra_k_cache,
                             const OptionalTensor& extra_indices, const OptionalTensor& extra_topk_length,
                             const OptionalTensor& attn_sink, double softmax_scale, bool batch_invariant, Tensor out) {
  expect_rank("sparse_mla_decode", "q", q, "[batch, s_q, h_q, d_qk]", 4);
  Tensor lse = empty(q, {q.size(0), q.size(2), q.size(1)}, accumulator_dtype(q));
  const SparseMlaDecodeArgs args{.q = view(q),
                                 .k_cache = view(k_cache),
                                 .indices = view(indices),
                                 .topk_length = view(topk_length),
                                 .extra_k_cache = view(extra_k_cache),
                                 .extra_indices = view(extra_indices),
                                 .extra_topk_length = view(extra_topk_length),
                                 .attn_sink = view(attn_sink),
                                 .softmax_scale = softmax_scale,
                                 .batch_invariant = batch_invariant,
                                 .out = view(out),
                                 .lse = view(lse)};
  Call call(q, sparse_mla_decode_workspace, args);
  dsm::sparse_mla_decode(args, call.launch());
  return lse;
}

std::tuple<Tensor, Tensor> sparse_mla_decode(const Tensor& q, const Tensor& k_cache, const Tensor& indices,
                                             const OptionalTensor& topk_length, const OptionalTensor& extra_k_cache,
                                             const OptionalTensor& extra_indices,
                                             const OptionalTensor& extra_topk_length, const OptionalTensor& attn_sink,
                                             double softmax_scale, bool batch_invariant, std::int64_t d_v) {
  Tensor out = empty_out("sparse_mla_decode", q, d_v);
  Tensor lse = sparse_mla_decode_out(q, k_cache, indices, topk_length, extra_k_cache, extra_indices, extra_topk_length,
                                     attn_sink, softmax_scale, batch_invariant, out);
  return {out, lse};
}

std::tuple<Tensor, Tensor> merge_attention_states(const Tensor& outs, const Tensor& lses,
                                                  const OptionalTensor& attn_sink) {
  expect_rank("merge_attention_states", "outs", outs, "[parts, batch, s_q, h_q, d_v]", 5);
  Tensor out = empty(outs, {outs.size(1), outs.size(2), outs.size(3), outs.size(4)}, outs.scalar_type());
  Tensor lse = empty(outs, {outs.size(1), outs.size(3), outs.size(2)}, accumulator_dtype(outs));
  Call call(outs);
  dsm::merge_attention_states(
      {.outs = view(outs), .lses = view(lses), .attn_sink = view(attn_sink), .out = view(out), .lse = view(lse)},
      call.launch());
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dsm, m) {
  m.def(
      "mla_decode(Tensor q, Tensor k_cache, Tensor block_table, Tensor cache_seqlens, float softmax_scale, "
      "bool causal, Tensor? k_scale, bool batch_invariant, int d_v) -> (Tensor out, Tensor lse)");
  m.def(
      "mla_decode_out(Tensor q, Tensor k_cache, Tensor block_table, Tensor cache_seqlens, float softmax_scale, "
      "bool causal, Tensor? k_scale, bool batch_invariant, Tensor(a!) out) -> Tensor lse");
  m.def(
      "sparse_mla_decode(Tensor q, Tensor k_cache, Tensor indices, Tensor? topk_length, Tensor? extra_k_cache, "
      "Tensor? extra_indices, Tensor? extra_topk_length, Tensor? attn_sink, float softmax_scale, "
      "bool batch_invariant, int d_v) -> (Tensor out, Tensor lse)");
  m.def(
      "sparse_mla_decode_out(Tensor q, Tensor k_cache, Tensor indices, Tensor? topk_length, Tensor? extra_k_cache, "
      "Tensor? extra_indices, Tensor? extra_topk_length, Tensor? attn_sink, float softmax_scale, "
      "bool batch_invariant, Tensor(a!) out) -> Tensor lse");
  m.def("merge_attention_states(Tensor outs, Tensor lses, Tensor? attn_sink) -> (Tensor out, Tensor lse)");
}

#define DSM_IMPLEMENT(library)                                              \
  library.impl("mla_decode", TORCH_BOX(&mla_decode));                       \
  library.impl("mla_decode_out", TORCH_BOX(&mla_decode_out));               \
  library.impl("sparse_mla_decode", TORCH_BOX(&sparse_mla_decode));         \
  library.impl("sparse_mla_decode_out", TORCH_BOX(&sparse_mla_decode_out)); \
  library.impl("merge_attention_states", TORCH_BOX(&merge_attention_states));

STABLE_TORCH_LIBRARY_IMPL(dsm, CPU, m){DSM_IMPLEMENT(m)} STABLE_TORCH_LIBRARY_IMPL(dsm, CUDA, m) { DSM_IMPLEMENT(m) }

}  // namespace dsm::binding
