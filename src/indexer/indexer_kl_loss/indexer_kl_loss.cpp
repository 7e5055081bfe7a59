// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/indexer/indexer_kl_loss/indexer_kl_loss.h"

#include "src/core/checks.h"
#include "src/core/registry.h"

namespace dsm {
namespace {

const Operator<IndexerKlLossArgs> forward("indexer", "indexer_kl_loss",
                                          {{"cpu", DeviceType::cpu, indexer_kl_loss_cpu}});
const Operator<IndexerKlLossBackwardArgs> backward("indexer", "indexer_kl_loss_backward",
                                                   {{"cpu", DeviceType::cpu, indexer_kl_loss_backward_cpu}});

/// What both passes take in. `a` is IndexerKlLossArgs or IndexerKlLossBackwardArgs.
template <class Args>
void check_inputs(const Check& check, const Args& a) {
  check.tensor("logits", a.logits, "[rows, n]", {Check::kAny, Check::kAny}, {DType::float64, DType::float32});
  const std::int64_t rows = a.logits.size(0);
  check.unit_last_stride("logits", a.logits);
  if (a.indices) {
    check.tensor("indices", a.indices, "[rows, slots]", {rows, Check::kAny}, {DType::int32});
    check.unit_last_stride("indices", a.indices);
    check.tensor("target", a.target, "[rows, slots]", {rows, a.indices.size(1)}, {a.logits.dtype});
  } else {
    check.tensor("target", a.target, "[rows, n]", {rows, a.logits.size(1)}, {a.logits.dtype});
  }
  check.unit_last_stride("target", a.target);
}

void check_args(const IndexerKlLossArgs& a) {
  const Check check("indexer_kl_loss");
  check_inputs(check, a);
  check.contiguous("loss", a.loss, "[rows]", {a.logits.size(0)}, {a.logits.dtype});
  check.on_device(a.logits.device, {{"target", a.target}, {"indices", a.indices}, {"loss", a.loss}});
}

void check_args(const IndexerKlLossBackwardArgs& a) {
  const Check check("indexer_kl_loss_backward");
  check_inputs(check, a);
  const std::int64_t rows = a.logits.size(0), n = a.logits.size(1);
  check.contiguous("dloss", a.dloss, "[rows]", {rows}, {a.logits.dtype});
  check.contiguous("dlogits", a.dlogits, "[rows, n]", {rows, n}, {a.logits.dtype});
  check.on_device(a.logits.device,
                  {{"dloss", a.dloss}, {"target", a.target}, {"indices", a.indices}, {"dlogits", a.dlogits}});
}

}  // namespace

void indexer_kl_loss(const IndexerKlLossArgs& args, const Launch& launch) {
  check_args(args);
  if (args.loss.numel() == 0) return;
  forward(args, args.logits.device, launch);
}

void indexer_kl_loss_backward(const IndexerKlLossBackwardArgs& args, const Launch& launch) {
  check_args(args);
  if (args.dlogits.numel() == 0) return;
  backward(args, args.logits.device, launch);
}

}  // namespace dsm
