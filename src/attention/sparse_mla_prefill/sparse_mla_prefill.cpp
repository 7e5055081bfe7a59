// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/attention/sparse_mla_prefill/sparse_mla_prefill.h"

#include <algorithm>

#include "src/attention/sparse_mla_checks.h"
#include "src/attention/sparse_mla_prefill/sparse_mla_prefill_sm90.h"
#include "src/core/registry.h"

namespace dsm {
namespace {

const Operator<SparseMlaPrefillArgs> prefill("attention", "sparse_mla_prefill",
                                             {{"sm90", DeviceType::cuda, DSM_CUDA_ROW(sparse_mla_prefill_sm90),
                                               DSM_CUDA_ROW(sparse_mla_prefill_sm90_refusal)},
                                              {"cuda", DeviceType::cuda, DSM_CUDA_ROW(sparse_mla_prefill_cuda)},
                                              {"cpu", DeviceType::cpu, sparse_mla_prefill_cpu}});

void check_args(const SparseMlaPrefillArgs& a) {
  const Check check("sparse_mla_prefill");
  attention::check_sparse_mla_inputs(check, a);
  const std::int64_t s_q = a.q.size(0), h_q = a.q.size(1), h_kv = a.kv.size(1);
  const DType wide = attention::statistics_dtype(a.q.dtype);
  check.tensor("out", a.out, "[s_q, h_q, d_v]", {s_q, h_q, Check::kAny}, {a.q.dtype});
  check.unit_last_stride("out", a.out);
  check.that(a.out.size(2) <= a.q.size(2), "d_v", "at most d_qk = " + std::to_string(a.q.size(2)), a.out.size(2));
  check.tensor("lse", a.lse, "[s_q, h_q]", {s_q, h_q}, {wide});
  if (a.max_logits) {
    check.contiguous("max_logits", a.max_logits, "[s_q, h_q]", {s_q, h_q}, {wide});
    check.contiguous("lse", a.lse, "[s_q, h_q]", {s_q, h_q}, {wide});
  }
  if (a.key_probs)
    check.contiguous("key_probs", a.key_probs, "[s_q, h_kv, topk]", {s_q, h_kv, a.indices.size(2)}, {wide});
  check.on_device(a.q.device, {{"max_logits", a.max_logits}, {"key_probs", a.key_probs}});
}

}  // namespace

void sparse_mla_prefill(const SparseMlaPrefillArgs& args, const Launch& launch) {
  check_args(args);
  if (args.q.size(0) == 0) return;
  Check("sparse_mla_prefill").workspace(launch, sparse_mla_prefill_workspace(args));
  prefill(args, args.q.device, launch);
}

std::size_t sparse_mla_prefill_workspace(const SparseMlaPrefillArgs& a) {
  if (a.q.device.type == DeviceType::cpu) return 0;
#if DSM_WITH_CUDA
  if (prefill.allows("sm90") && sparse_mla_prefill_sm90_refusal(a).empty()) return sparse_mla_prefill_sm90_workspace(a);
  return sparse_mla_prefill_cuda_workspace(a);
#else
  return 0;
#endif
}

}  // namespace dsm
