// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "dsm/sparse_mla.h"

#include <string>
#include <tuple>

#include "bindings/torch/convert.h"
#include "dsm/error.h"

namespace dsm::binding {
namespace {

using OptionalTensor = std::optional<Tensor>;

// The shapes of outputs follow from the inputs' before the operator has checked those.
void expect_rank_3(const char* operation, const char* argument, const Tensor& tensor, const char* shape_text) {
  if (tensor.dim() != 3) throw Error(operation, argument, shape_text, describe(view(tensor)));
}

std::tuple<Tensor, Tensor, Tensor> sparse_mla_prefill_out(const Tensor& q, const Tensor& kv, const Tensor& indices,
                                                          const OptionalTensor& attn_sink,
                                                          const OptionalTensor& topk_length, double softmax_scale,
                                                          bool return_key_probs, Tensor out) {
  expect_rank_3("sparse_mla_prefill", "q", q, "[s_q, h_q, d_qk]");
  expect_rank_3("sparse_mla_prefill", "indices", indices, "[s_q, h_kv, topk]");
  Tensor max_logits = empty(q, {q.size(0), q.size(1)}, accumulator_dtype(q));
  Tensor lse = empty(q, {q.size(0), q.size(1)}, accumulator_dtype(q));
  // A schema cannot return an optional tensor that Python understands everywhere: not wanted, key_probs is empty.
  Tensor key_probs = return_key_probs
                         ? empty(indices, {indices.size(0), indices.size(1), indices.size(2)}, accumulator_dtype(q))
                         : empty(q, {0}, accumulator_dtype(q));
  const SparseMlaPrefillArgs args{.q = view(q),
                                  .kv = view(kv),
                                  .indices = view(indices),
                                  .attn_sink = view(attn_sink),
                                  .topk_length = view(topk_length),
                                  .softmax_scale = softmax_scale,
                                  .out = view(out),
                                  .max_logits = view(max_logits),
                                  .lse = view(lse),
                                  .key_probs = return_key_probs ? view(key_probs) : TensorView()};
  Call call(q, sparse_mla_prefill_workspace, args);
  dsm::sparse_mla_prefill(args, call.launch());
  return {max_logits, lse, key_probs};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_mla_prefill(const Tensor& q, const Tensor& kv, const Tensor& indices,
                                                              const OptionalTensor& attn_sink,
                                                              const OptionalTensor& topk_length, double softmax_scale,
                                                              std::int64_t d_v, bool return_key_probs) {
  expect_rank_3("sparse_mla_prefill", "q", q, "[s_q, h_q, d_qk]");
  if (d_v < 0) throw Error("sparse_mla_prefill", "d_v", "at least 0", std::to_string(d_v));
  Tensor out = empty(q, {q.size(0), q.size(1), d_v}, q.scalar_type());
  const auto [max_logits, lse, key_probs] =
      sparse_mla_prefill_out(q, kv, indices, attn_sink, topk_length, softmax_scale, return_key_probs, out);
  return {out, max_logits, lse, key_probs};
}

std::tuple<Tensor, Tensor, Tensor> sparse_mla_backward(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q,
                                                       const Tensor& kv, const Tensor& indices,
                                                       const OptionalTensor& attn_sink,
                                                       const OptionalTensor& topk_length, const Tensor& out,
                                                       const Tensor& lse, double softmax_scale) {
  Tensor dq = empty_like(q), dkv = empty_like(kv);
  Tensor dattn_sink = attn_sink ? empty_like(*attn_sink) : empty(q, {0}, accumulator_dtype(q));
  Call call(q);
  dsm::sparse_mla_backward({.dout = view(dout),
                            .dlse = view(dlse),
                            .q = view(q),
                            .kv = view(kv),
                            .indices = view(indices),
                            .attn_sink = view(attn_sink),
                            .topk_length = view(topk_length),
                            .out = view(out),
                            .lse = view(lse),
                            .softmax_scale = softmax_scale,
                            .dq = view(dq),
                            .dkv = view(dkv),
                            .dattn_sink = attn_sink ? view(dattn_sink) : TensorView()},
                           call.launch());
  return {dq, dkv, dattn_sink};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dsm, m) {
  m.def(
      "sparse_mla_prefill(Tensor q, Tensor kv, Tensor indices, Tensor? attn_sink, Tensor? topk_length, "
      "float softmax_scale, int d_v, bool return_key_probs) -> "
      "(Tensor out, Tensor max_logits, Tensor lse, Tensor key_probs)");
  m.def(
      "sparse_mla_prefill_out(Tensor q, Tensor kv, Tensor indices, Tensor? attn_sink, Tensor? topk_length, "
      "float softmax_scale, bool return_key_probs, Tensor(a!) out) -> "
      "(Tensor max_logits, Tensor lse, Tensor key_probs)");
  m.def(
      "sparse_mla_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor kv, Tensor indices, Tensor? attn_sink, "
      "Tensor? topk_length, Tensor out, Tensor lse, float softmax_scale) -> "
      "(Tensor dq, Tensor dkv, Tensor dattn_sink)");
}

#define DSM_IMPLEMENT(library)                                                \
  library.impl("sparse_mla_prefill", TORCH_BOX(&sparse_mla_prefill));         \
  library.impl("sparse_mla_prefill_out", TORCH_BOX(&sparse_mla_prefill_out)); \
  library.impl("sparse_mla_backward", TORCH_BOX(&sparse_mla_backward));

STABLE_TORCH_LIBRARY_IMPL(dsm, CPU, m){DSM_IMPLEMENT(m)} STABLE_TORCH_LIBRARY_IMPL(dsm, CUDA, m) { DSM_IMPLEMENT(m) }

}  // namespace dsm::binding
