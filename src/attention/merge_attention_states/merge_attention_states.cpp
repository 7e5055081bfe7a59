// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/attention/merge_attention_states/merge_attention_states.h"

#include "src/core/checks.h"
#include "src/core/registry.h"

namespace dsm {
namespace {

const Operator<MergeAttentionStatesArgs> merge_states("attention", "merge_attention_states",
                                                      {{"cuda", DeviceType::cuda,
                                                        DSM_CUDA_ROW(merge_attention_states_cuda)},
                                                       {"cpu", DeviceType::cpu, merge_attention_states_cpu}});

void check_args(const MergeAttentionStatesArgs& a) {
  constexpr std::int64_t any = Check::kAny;
  const Check check("merge_attention_states");
  check.tensor("outs", a.outs, "[parts, batch, s_q, h_q, d_v]", {any, any, any, any, any}, kFloating);
  check.unit_last_stride("outs", a.outs);
  const std::int64_t parts = a.outs.size(0), batch = a.outs.size(1), s_q = a.outs.size(2), h_q = a.outs.size(3);
  const DType statistics = a.outs.dtype == DType::float64 ? DType::float64 : DType::float32;
  check.tensor("lses", a.lses, "[parts, batch, h_q, s_q]", {parts, batch, h_q, s_q}, {statistics});
  if (a.attn_sink) check.contiguous("attn_sink", a.attn_sink, "[h_q]", {h_q}, {statistics});
  check.contiguous("out", a.out, "[batch, s_q, h_q, d_v]", {batch, s_q, h_q, a.outs.size(4)}, {a.outs.dtype});
  check.contiguous("lse", a.lse, "[batch, h_q, s_q]", {batch, h_q, s_q}, {statistics});
  check.on_device(a.outs.device, {{"lses", a.lses}, {"attn_sink", a.attn_sink}, {"out", a.out}, {"lse", a.lse}});
}

}  // namespace

void merge_attention_states(const MergeAttentionStatesArgs& args, const Launch& launch) {
  check_args(args);
  if (args.lse.numel() == 0) return;
  merge_states(args, args.outs.device, launch);
}

}  // namespace dsm
