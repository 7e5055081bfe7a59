// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/indexer/indexer_topk/indexer_topk.h"

#include <limits>

#include "src/core/checks.h"
#include "src/core/registry.h"

namespace dsm {
namespace {

const Operator<IndexerTopkArgs> forward("indexer", "indexer_topk", {{"cpu", DeviceType::cpu, indexer_topk_cpu}});

void check_args(const IndexerTopkArgs& a) {
  const Check check("indexer_topk");
  check.tensor("logits", a.logits, "[rows, n]", {Check::kAny, Check::kAny}, {DType::float32});
  const std::int64_t rows = a.logits.size(0), n = a.logits.size(1);
  check.unit_last_stride("logits", a.logits);
  check.that(n <= std::numeric_limits<std::int32_t>::max(), "n", "below 2^31", n);
  if (a.starts) check.contiguous("starts", a.starts, "[rows]", {rows}, {DType::int32});
  if (a.ends) check.contiguous("ends", a.ends, "[rows]", {rows}, {DType::int32});
  check.contiguous("indices", a.indices, "[rows, topk]", {rows, Check::kAny}, {DType::int32});
  check.on_device(a.logits.device, {{"starts", a.starts}, {"ends", a.ends}, {"indices", a.indices}});
}

}  // namespace

void indexer_topk(const IndexerTopkArgs& args, const Launch& launch) {
  check_args(args);
  if (args.indices.numel() == 0) return;
  forward(args, args.logits.device, launch);
}

}  // namespace dsm
