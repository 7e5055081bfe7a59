// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "dsm/attention.h"

#include <tuple>
#include <vector>

#include "bindings/torch/convert.h"
#include "dsm/error.h"

namespace dsm::binding {
namespace {

using OptionalTensor = std::optional<Tensor>;

// The shapes of outputs follow from the inputs' before the operator has checked those.
void expect_rank(const char* operation, const char* argument, const Tensor& tensor, const char* shape_text, int rank) {
  if (tensor.dim() != rank) throw Error(operation, argument, shape_text, describe(view(tensor)));
}

std::tuple<Tensor, Tensor> flash_attn(const Tensor& q, const Tensor& k, const Tensor& v,
                                      const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_kv,
                                      double softmax_scale, bool causal) {
  const bool varlen = cu_seqlens_q.has_value();
  const int rank = varlen ? 3 : 4;
  expect_rank("flash_attn", "q", q, varlen ? "[total_q, h_q, d_qk]" : "[batch, s_q, h_q, d_qk]", rank);
  expect_rank("flash_attn", "v", v, varlen ? "[total_kv, h_kv, d_v]" : "[batch, s_kv, h_kv, d_v]", rank);
  const std::int64_t rows = q.size(rank - 3), h_q = q.size(rank - 2), d_v = v.size(rank - 1);
  using Shape = std::vector<std::int64_t>;
  Tensor out = empty(q, varlen ? Shape{rows, h_q, d_v} : Shape{q.size(0), rows, h_q, d_v}, q.scalar_type());
  Tensor lse = empty(q, varlen ? Shape{h_q, rows} : Shape{q.size(0), h_q, rows}, accumulator_dtype(q));
  const FlashAttnArgs args{.q = view(q),
                           .k = view(k),
                           .v = view(v),
                           .cu_seqlens_q = view(cu_seqlens_q),
                           .cu_seqlens_kv = view(cu_seqlens_kv),
                           .softmax_scale = softmax_scale,
                           .causal = causal,
                           .out = view(out),
                           .lse = view(lse)};
  Call call(q, flash_attn_workspace, args);
  dsm::flash_attn(args, call.launch());
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> flash_attn_backward(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q,
                                                       const Tensor& k, const Tensor& v, const Tensor& out,
                                                       const Tensor& lse, const OptionalTensor& cu_seqlens_q,
                                                       const OptionalTensor& cu_seqlens_kv, double softmax_scale,
                                                       bool causal) {
  Tensor dq = empty_like(q), dk = empty_like(k), dv = empty_like(v);
  const FlashAttnBackwardArgs args{.dout = view(dout),
                                   .dlse = view(dlse),
                                   .q = view(q),
                                   .k = view(k),
                                   .v = view(v),
                                   .out = view(out),
                                   .lse = view(lse),
                                   .cu_seqlens_q = view(cu_seqlens_q),
                                   .cu_seqlens_kv = view(cu_seqlens_kv),
                                   .softmax_scale = softmax_scale,
                                   .causal = causal,
                                   .dq = view(dq),
                                   .dk = view(dk),
                                   .dv = view(dv)};
  Call call(q, flash_attn_backward_workspace, args);
  dsm::flash_attn_backward(args, call.launch());
  return {dq, dk, dv};
}

std::tuple<Tensor, Tensor, Tensor> flash_dmla(const Tensor& q, const Tensor& k, const Tensor& v,
                                              const OptionalTensor& wk, const OptionalTensor& wv, double softmax_scale,
                                              bool causal, bool cache_is_latent, bool project_output) {
  expect_rank("flash_dmla", "q", q, "[batch, heads, s_q, d_qk]", 4);
  if (wk) expect_rank("flash_dmla", "wk", *wk, "[d_qk, d_latent]", 2);
  if (wv) expect_rank("flash_dmla", "wv", *wv, "[d_v, d_latent]", 2);
  if (project_output && !wv) throw Error("flash_dmla", "wv", "given for an output projection", "nothing");
  const std::int64_t batch = q.size(0), heads = q.size(1), s_q = q.size(2);
  Tensor latent = empty(q, {batch, heads, s_q, wk ? wk->size(1) : q.size(3)}, q.scalar_type());
  // A schema cannot return an optional tensor that Python understands everywhere: not projected, out is empty.
  Tensor out =
      project_output ? empty(q, {batch, heads, s_q, wv->size(0)}, q.scalar_type()) : empty(q, {0}, q.scalar_type());
  Tensor lse = empty(q, {batch, heads, s_q}, accumulator_dtype(q));
  const FlashDmlaArgs args{.q = view(q),
                           .k = view(k),
                           .v = view(v),
                           .wk = view(wk),
                           .wv = view(wv),
                           .softmax_scale = softmax_scale,
                           .causal = causal,
                           .cache_is_latent = cache_is_latent,
                           .out = project_output ? view(out) : TensorView(),
                           .latent = view(latent),
                           .lse = view(lse)};
  Call call(q, flash_dmla_workspace, args);
  dsm::flash_dmla(args, call.launch());
  return {out, latent, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> flash_dmla_backward(
    const OptionalTensor& dout, const OptionalTensor& dlatent, const OptionalTensor& dlse, const Tensor& q,
    const Tensor& k, const Tensor& v, const OptionalTensor& wk, const OptionalTensor& wv, const Tensor& latent,
    const Tensor& lse, double softmax_scale, bool causal, bool cache_is_latent) {
  Tensor dq = empty_like(q), dk = empty_like(k), dv = empty_like(v);
  Tensor dwk = wk ? empty_like(*wk) : empty(q, {0}, q.scalar_type());
  Tensor dwv = wv ? empty_like(*wv) : empty(q, {0}, q.scalar_type());
  const FlashDmlaBackwardArgs args{.dout = view(dout),
                                   .dlatent = view(dlatent),
                                   .dlse = view(dlse),
                                   .q = view(q),
                                   .k = view(k),
                                   .v = view(v),
                                   .wk = view(wk),
                                   .wv = view(wv),
                                   .latent = view(latent),
                                   .lse = view(lse),
                                   .softmax_scale = softmax_scale,
                                   .causal = causal,
                                   .cache_is_latent = cache_is_latent,
                                   .dq = view(dq),
                                   .dk = view(dk),
                                   .dv = view(dv),
                                   .dwk = wk ? view(dwk) : TensorView(),
                                   .dwv = wv ? view(dwv) : TensorView()};
  Call call(q, flash_dmla_backward_workspace, args);
  dsm::flash_dmla_backward(args, call.launch());
  return {dq, dk, dv, dwk, dwv};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dsm, m) {
  m.def(
      "flash_attn(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_kv, float softmax_scale, "
      "bool causal) -> (Tensor out, Tensor lse)");
  m.def(
      "flash_attn_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_kv, float softmax_scale, bool causal) -> "
      "(Tensor dq, Tensor dk, Tensor dv)");
  m.def(
      "flash_dmla(Tensor q, Tensor k, Tensor v, Tensor? wk, Tensor? wv, float softmax_scale, bool causal, "
      "bool cache_is_latent, bool project_output) -> (Tensor out, Tensor latent, Tensor lse)");
  m.def(
      "flash_dmla_backward(Tensor? dout, Tensor? dlatent, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? wk, "
      "Tensor? wv, Tensor latent, Tensor lse, float softmax_scale, bool causal, bool cache_is_latent) -> "
      "(Tensor dq, Tensor dk, Tensor dv, Tensor dwk, Tensor dwv)");
}

#define DSM_IMPLEMENT(library)                                          \
  library.impl("flash_attn", TORCH_BOX(&flash_attn));                   \
  library.impl("flash_attn_backward", TORCH_BOX(&flash_attn_backward)); \
  library.impl("flash_dmla", TORCH_BOX(&flash_dmla));                   \
  library.impl("flash_dmla_backward", TORCH_BOX(&flash_dmla_backward));

STABLE_TORCH_LIBRARY_IMPL(dsm, CPU, m){DSM_IMPLEMENT(m)} STABLE_TORCH_LIBRARY_IMPL(dsm, CUDA, m) { DSM_IMPLEMENT(m) }

}  // namespace dsm::binding
