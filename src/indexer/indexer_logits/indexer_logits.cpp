// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/indexer/indexer_logits/indexer_logits.h"

#include "src/core/checks.h"
#include "src/core/registry.h"

namespace dsm {
namespace {

const Operator<IndexerLogitsArgs> forward("indexer", "indexer_logits", {{"cpu", DeviceType::cpu, indexer_logits_cpu}});
const Operator<IndexerLogitsBackwardArgs> backward("indexer", "indexer_logits_backward",
                                                   {{"cpu", DeviceType::cpu, indexer_logits_backward_cpu}});

DType wide_of(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

/// What both passes take in, keys excepted. `a` is IndexerLogitsArgs or IndexerLogitsBackwardArgs.
template <class Args>
void check_query_side(const Check& check, const Args& a, Check::DTypes dtypes) {
  check.tensor("q", a.q, "[s_q, heads, d]", {Check::kAny, Check::kAny, Check::kAny}, dtypes);
  const std::int64_t s_q = a.q.size(0), heads = a.q.size(1);
  check.unit_last_stride("q", a.q);
  check.tensor("weights", a.weights, "[s_q, heads]", {s_q, heads}, {wide_of(a.q.dtype)});
  check.unit_last_stride("weights", a.weights);
  if (a.starts) check.contiguous("starts", a.starts, "[s_q]", {s_q}, {DType::int32});
  if (a.ends) check.contiguous("ends", a.ends, "[s_q]", {s_q}, {DType::int32});
}

void check_args(const IndexerLogitsArgs& a) {
  const Check check("indexer_logits");
  check_query_side(check, a, {DType::float64, DType::float32, DType::float16, DType::bfloat16, DType::float8_e4m3fn});
  const DType dtype = a.q.dtype, or_fp8 = dtype == DType::float64 ? dtype : DType::float8_e4m3fn;
  check.tensor("k", a.k, "[s_kv, d]", {Check::kAny, a.q.size(2)}, {dtype, or_fp8});
  check.unit_last_stride("k", a.k);
  const std::int64_t s_kv = a.k.size(0);
  if (a.k_scale) {
    check.that(a.k.dtype == DType::float8_e4m3fn, "k_scale", "given with FP8 keys only", describe(a.k_scale));
    check.contiguous("k_scale", a.k_scale, "[s_kv]", {s_kv}, {DType::float32});
  }
  check.contiguous("logits", a.logits, "[s_q, s_kv]", {a.q.size(0), s_kv}, {wide_of(dtype)});
  check.on_device(a.q.device, {{"k", a.k},
                               {"k_scale", a.k_scale},
                               {"weights", a.weights},
                               {"starts", a.starts},
                               {"ends", a.ends},
                               {"logits", a.logits}});
}

void check_args(const IndexerLogitsBackwardArgs& a) {
  const Check check("indexer_logits_backward");
  check_query_side(check, a, kFloating);
  const std::int64_t s_q = a.q.size(0), heads = a.q.size(1), d = a.q.size(2);
  check.tensor("k", a.k, "[s_kv, d]", {Check::kAny, d}, {a.q.dtype});
  check.unit_last_stride("k", a.k);
  check.tensor("dlogits", a.dlogits, "[s_q, s_kv]", {s_q, a.k.size(0)}, {wide_of(a.q.dtype)});
  check.unit_last_stride("dlogits", a.dlogits);
  check.contiguous("dq", a.dq, "[s_q, heads, d]", {s_q, heads, d}, {a.q.dtype});
  check.contiguous("dk", a.dk, "[s_kv, d]", {a.k.size(0), d}, {a.k.dtype});
  check.contiguous("dweights", a.dweights, "[s_q, heads]", {s_q, heads}, {a.weights.dtype});
  check.on_device(a.q.device, {{"dlogits", a.dlogits},
                               {"k", a.k},
                               {"weights", a.weights},
                               {"starts", a.starts},
                               {"ends", a.ends},
                               {"dq", a.dq},
                               {"dk", a.dk},
                               {"dweights", a.dweights}});
}

}  // namespace

void indexer_logits(const IndexerLogitsArgs& args, const Launch& launch) {
  check_args(args);
  if (args.logits.numel() == 0) return;
  forward(args, args.q.device, launch);
}

void indexer_logits_backward(const IndexerLogitsBackwardArgs& args, const Launch& launch) {
  check_args(args);
  // No early return without queries or keys: the gradients of the others must still become zero.
  backward(args, args.q.device, launch);
}

}  // namespace dsm
