// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "dsm/indexer.h"

#include <string>
#include <tuple>

#include "bindings/torch/convert.h"
#include "dsm/error.h"

namespace dsm::binding {
namespace {

using OptionalTensor = std::optional<Tensor>;

IndexerFormat format_named(const std::string& name) {
  if (name == "none") return IndexerFormat::none;
  if (name == "fp4") return IndexerFormat::fp4;
  if (name == "fp8") return IndexerFormat::fp8;
  throw Error("hadamard_quantize", "format", "none|fp4|fp8", "'" + name + "'");
}

/// The results' shapes are known only when the tensor has its dimensions.
void require_rank(const char* operation, const char* argument, const Tensor& tensor, int rank) {
  if (tensor.dim() != rank)
    throw Error(operation, argument, "of " + std::to_string(rank) + " dimensions", describe(view(tensor)));
}

void require_extent(const char* operation, const char* argument, std::int64_t value) {
  if (value < 0) throw Error(operation, argument, "at least 0", std::to_string(value));
}

std::tuple<Tensor, Tensor> hadamard_quantize(const Tensor& x, const std::string& format_name, bool rotate) {
  const IndexerFormat format = format_named(format_name);
  require_rank("hadamard_quantize", "x", x, 2);
  const bool fp8 = format == IndexerFormat::fp8;
  Tensor y = empty(x, {x.size(0), x.size(1)}, fp8 ? ScalarType::Float8_e4m3fn : x.scalar_type());
  // A schema cannot return an optional tensor that Python understands everywhere: without a scale it is empty.
  Tensor scale = empty(x, {fp8 ? x.size(0) : 0}, ScalarType::Float);
  Call call(x);
  dsm::hadamard_quantize(
      {.x = view(x), .rotate = rotate, .format = format, .y = view(y), .scale = fp8 ? view(scale) : TensorView()},
      call.launch());
  return {y, scale};
}

Tensor indexer_logits(const Tensor& q, const Tensor& k, const Tensor& weights, const OptionalTensor& k_scale,
                      const OptionalTensor& starts, const OptionalTensor& ends) {
  require_rank("indexer_logits", "q", q, 3);
  require_rank("indexer_logits", "k", k, 2);
  Tensor logits = empty(q, {q.size(0), k.size(0)}, accumulator_dtype(q));
  Call call(q);
  dsm::indexer_logits({.q = view(q),
                       .k = view(k),
                       .k_scale = view(k_scale),
                       .weights = view(weights),
                       .starts = view(starts),
                       .ends = view(ends),
                       .logits = view(logits)},
                      call.launch());
  return logits;
}

std::tuple<Tensor, Tensor, Tensor> indexer_logits_backward(const Tensor& dlogits, const Tensor& q, const Tensor& k,
                                                           const Tensor& weights, const OptionalTensor& starts,
                                                           const OptionalTensor& ends) {
  Tensor dq = empty_like(q), dk = empty_like(k), dweights = empty_like(weights);
  Call call(q);
  dsm::indexer_logits_backward({.dlogits = view(dlogits),
                                .q = view(q),
                                .k = view(k),
                                .weights = view(weights),
                                .starts = view(starts),
                                .ends = view(ends),
                                .dq = view(dq),
                                .dk = view(dk),
                                .dweights = view(dweights)},
                               call.launch());
  return {dq, dk, dweights};
}

Tensor paged_indexer_logits(const Tensor& q, const Tensor& cache, const Tensor& weights, const Tensor& context_lens,
                            const Tensor& block_table, std::int64_t max_len) {
  require_rank("paged_indexer_logits", "q", q, 4);
  require_extent("paged_indexer_logits", "max_len", max_len);
  Tensor logits = empty(q, {q.size(0), q.size(1), max_len}, accumulator_dtype(q));
  Call call(q);
  dsm::paged_indexer_logits({.q = view(q),
                             .cache = view(cache),
                             .weights = view(weights),
                             .context_lens = view(context_lens),
                             .block_table = view(block_table),
                             .logits = view(logits)},
                            call.launch());
  return logits;
}

Tensor indexer_topk(const Tensor& logits, std::int64_t topk, const OptionalTensor& ends, const OptionalTensor& starts) {
  require_rank("indexer_topk", "logits", logits, 2);
  require_extent("indexer_topk", "topk", topk);
  Tensor indices = empty(logits, {logits.size(0), topk}, ScalarType::Int);
  Call call(logits);
  dsm::indexer_topk({.logits = view(logits), .starts = view(starts), .ends = view(ends), .indices = view(indices)},
                    call.launch());
  return indices;
}

Tensor indexer_kl_loss(const Tensor& logits, const Tensor& target, const OptionalTensor& indices) {
  require_rank("indexer_kl_loss", "logits", logits, 2);
  Tensor loss = empty(logits, {logits.size(0)}, logits.scalar_type());
  Call call(logits);
  dsm::indexer_kl_loss({.logits = view(logits), .target = view(target), .indices = view(indices), .loss = view(loss)},
                       call.launch());
  return loss;
}

Tensor indexer_kl_loss_backward(const Tensor& dloss, const Tensor& logits, const Tensor& target,
                                const OptionalTensor& indices) {
  Tensor dlogits = empty_like(logits);
  Call call(logits);
  dsm::indexer_kl_loss_backward({.dloss = view(dloss),
                                 .logits = view(logits),
                                 .target = view(target),
                                 .indices = view(indices),
                                 .dlogits = view(dlogits)},
                                call.launch());
  return dlogits;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dsm, m) {
  m.def("hadamard_quantize(Tensor x, str format, bool rotate) -> (Tensor y, Tensor scale)");
  m.def("indexer_logits(Tensor q, Tensor k, Tensor weights, Tensor? k_scale, Tensor? starts, Tensor? ends) -> Tensor");
  m.def(
      "indexer_logits_backward(Tensor dlogits, Tensor q, Tensor k, Tensor weights, Tensor? starts, Tensor? ends) -> "
      "(Tensor dq, Tensor dk, Tensor dweights)");
  m.def(
      "paged_indexer_logits(Tensor q, Tensor cache, Tensor weights, Tensor context_lens, Tensor block_table, int "
      "max_len) -> Tensor");
  m.def("indexer_topk(Tensor logits, int topk, Tensor? ends, Tensor? starts) -> Tensor");
  m.def("indexer_kl_loss(Tensor logits, Tensor target, Tensor? indices) -> Tensor");
  m.def("indexer_kl_loss_backward(Tensor dloss, Tensor logits, Tensor target, Tensor? indices) -> Tensor");
}

#define DSM_IMPLEMENT(library)                                                  \
  library.impl("hadamard_quantize", TORCH_BOX(&hadamard_quantize));             \
  library.impl("indexer_logits", TORCH_BOX(&indexer_logits));                   \
  library.impl("indexer_logits_backward", TORCH_BOX(&indexer_logits_backward)); \
  library.impl("paged_indexer_logits", TORCH_BOX(&paged_indexer_logits));       \
  library.impl("indexer_topk", TORCH_BOX(&indexer_topk));                       \
  library.impl("indexer_kl_loss", TORCH_BOX(&indexer_kl_loss));                 \
  library.impl("indexer_kl_loss_backward", TORCH_BOX(&indexer_kl_loss_backward));

STABLE_TORCH_LIBRARY_IMPL(dsm, CPU, m){DSM_IMPLEMENT(m)} STABLE_TORCH_LIBRARY_IMPL(dsm, CUDA, m) { DSM_IMPLEMENT(m) }

}  // namespace dsm::binding
