// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/attention/sparse_mla_backward/sparse_mla_backward.h"

#include "src/attention/sparse_mla_checks.h"
#include "src/core/registry.h"

namespace dsm {
namespace {

const Operator<SparseMlaBackwardArgs> backward("attention", "sparse_mla_backward",
                                               {{"cpu", DeviceType::cpu, sparse_mla_backward_cpu}});

void check_args(const SparseMlaBackwardArgs& a) {
  const Check check("sparse_mla_backward");
  attention::check_sparse_mla_inputs(check, a);
  const std::int64_t s_q = a.q.size(0), h_q = a.q.size(1), d_qk = a.q.size(2);
  const DType wide = attention::statistics_dtype(a.q.dtype);
  check.tensor("out", a.out, "[s_q, h_q, d_v]", {s_q, h_q, Check::kAny}, {a.q.dtype});
  check.unit_last_stride("out", a.out);
  check.that(a.out.size(2) <= d_qk, "d_v", "at most d_qk = " + std::to_string(d_qk), a.out.size(2));
  check.tensor("dout", a.dout, "[s_q, h_q, d_v]", {s_q, h_q, a.out.size(2)}, {a.q.dtype});
  check.unit_last_stride("dout", a.dout);
  check.contiguous("lse", a.lse, "[s_q, h_q]", {s_q, h_q}, {wide});
  if (a.dlse) check.contiguous("dlse", a.dlse, "[s_q, h_q]", {s_q, h_q}, {wide});
  check.contiguous("dq", a.dq, "[s_q, h_q, d_qk]", {s_q, h_q, d_qk}, {a.q.dtype});
  check.contiguous("dkv", a.dkv, "[s_kv, h_kv, d_qk]", {a.kv.size(0), a.kv.size(1), d_qk}, {a.q.dtype});
  check.that(bool(a.attn_sink) == bool(a.dattn_sink), "dattn_sink", "given exactly when attn_sink is",
             describe(a.dattn_sink));
  if (a.dattn_sink) check.contiguous("dattn_sink", a.dattn_sink, "[h_q]", {h_q}, {wide});
  check.on_device(a.q.device,
                  {{"dout", a.dout}, {"dlse", a.dlse}, {"dq", a.dq}, {"dkv", a.dkv}, {"dattn_sink", a.dattn_sink}});
}

}  // namespace

void sparse_mla_backward(const SparseMlaBackwardArgs& args, const Launch& launch) {
  check_args(args);
  // No early return without queries: dkv and dattn_sink must still become zero.
  backward(args, args.q.device, launch);
}

}  // namespace dsm
