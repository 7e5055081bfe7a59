// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/attention/flash_attn/flash_attn.h"

#include <cmath>

#include "src/core/checks.h"
#include "src/core/registry.h"

namespace dsm {
namespace {

const Operator<FlashAttnArgs> forward("attention", "flash_attn", {{"cpu", DeviceType::cpu, flash_attn_cpu}});
const Operator<FlashAttnBackwardArgs> backward("attention", "flash_attn_backward",
                                               {{"cpu", DeviceType::cpu, flash_attn_backward_cpu}});

/// What both passes take in. `a` is FlashAttnArgs or FlashAttnBackwardArgs.
template <class Args>
void check_inputs(const Check& check, const Args& a) {
  constexpr std::int64_t any = Check::kAny;
  const bool varlen = bool(a.cu_seqlens_q);
  check.that(varlen == bool(a.cu_seqlens_kv), "cu_seqlens_kv", "given exactly when cu_seqlens_q is",
             describe(a.cu_seqlens_kv));
  if (varlen) {
    check.tensor("q", a.q, "[total_q, h_q, d_qk]", {any, any, any}, kFloating);
    check.tensor("k", a.k, "[total_kv, h_kv, d_qk]", {any, any, a.q.size(2)}, {a.q.dtype});
    check.tensor("v", a.v, "[total_kv, h_kv, d_v]", {a.k.size(0), a.k.size(1), any}, {a.q.dtype});
    check.offsets("cu_seqlens_q", a.cu_seqlens_q, a.q.size(0));
    check.contiguous("cu_seqlens_kv", a.cu_seqlens_kv, "[batch + 1]", {a.cu_seqlens_q.size(0)}, {DType::int32});
    check.offsets("cu_seqlens_kv", a.cu_seqlens_kv, a.k.size(0));
  } else {
    check.tensor("q", a.q, "[batch, s_q, h_q, d_qk]", {any, any, any, any}, kFloating);
    check.tensor("k", a.k, "[batch, s_kv, h_kv, d_qk]", {a.q.size(0), any, any, a.q.size(3)}, {a.q.dtype});
    check.tensor("v", a.v, "[batch, s_kv, h_kv, d_v]", {a.q.size(0), a.k.size(1), a.k.size(2), any}, {a.q.dtype});
  }
  const std::int64_t h_q = a.q.size(-2), h_kv = a.k.size(-2);
  check.that(h_kv > 0 && h_q % h_kv == 0, "h_q", "a multiple of h_kv = " + std::to_string(h_kv), h_q);
  check.unit_last_stride("q", a.q);
  check.unit_last_stride("k", a.k);
  check.unit_last_stride("v", a.v);
  check.that(std::isfinite(a.softmax_scale), "softmax_scale", "finite", std::to_string(a.softmax_scale));
}

/// The rows and heads of queries in [..., s_q, h_q, d] order: [batch, s_q, h_q, d] or, varlen, [total_q, h_q, d].
template <class Args>
void check_query_side(const Check& check, const Args& a, const char* argument, const TensorView& tensor,
                      bool contiguous) {
  const std::int64_t rows = a.q.size(-3), h_q = a.q.size(-2), d_v = a.v.size(-1);
  if (a.cu_seqlens_q) {
    check.tensor(argument, tensor, "[total_q, h_q, d_v]", {rows, h_q, d_v}, {a.q.dtype});
  } else {
    check.tensor(argument, tensor, "[batch, s_q, h_q, d_v]", {a.q.size(0), rows, h_q, d_v}, {a.q.dtype});
  }
  check.unit_last_stride(argument, tensor);
  if (contiguous) check.that(tensor.contiguous(), argument, "contiguous", "a strided tensor");
}

template <class Args>
void check_statistics(const Check& check, const Args& a, const char* argument, const TensorView& tensor) {
  const DType dtype = a.q.dtype == DType::float64 ? DType::float64 : DType::float32;
  const std::int64_t rows = a.q.size(-3), h_q = a.q.size(-2);
  if (a.cu_seqlens_q) {
    check.contiguous(argument, tensor, "[h_q, total_q]", {h_q, rows}, {dtype});
  } else {
    check.contiguous(argument, tensor, "[batch, h_q, s_q]", {a.q.size(0), h_q, rows}, {dtype});
  }
}

void check_gradient(const Check& check, const char* argument, const TensorView& gradient, const TensorView& of) {
  if (of.rank == 3) {
    check.contiguous(argument, gradient, "[rows, heads, d]", {of.size(0), of.size(1), of.size(2)}, {of.dtype});
  } else {
    check.contiguous(argument, gradient, "[batch, rows, heads, d]", {of.size(0), of.size(1), of.size(2), of.size(3)},
                     {of.dtype});
  }
}

void check_args(const FlashAttnArgs& a) {
  const Check check("flash_attn");
  check_inputs(check, a);
  check_query_side(check, a, "out", a.out, true);
  check_statistics(check, a, "lse", a.lse);
  check.on_device(a.q.device, {{"k", a.k},
                               {"v", a.v},
                               {"cu_seqlens_q", a.cu_seqlens_q},
                               {"cu_seqlens_kv", a.cu_seqlens_kv},
                               {"out", a.out},
                               {"lse", a.lse}});
}

void check_args(const FlashAttnBackwardArgs& a) {
  const Check check("flash_attn_backward");
  check_inputs(check, a);
  check_query_side(check, a, "dout", a.dout, false);
  if (a.dlse) check_statistics(check, a, "dlse", a.dlse);
  check_query_side(check, a, "out", a.out, true);
  check_statistics(check, a, "lse", a.lse);
  check_gradient(check, "dq", a.dq, a.q);
  check_gradient(check, "dk", a.dk, a.k);
  check_gradient(check, "dv", a.dv, a.v);
  check.on_device(a.q.device, {{"dout", a.dout},
                               {"dlse", a.dlse},
                               {"k", a.k},
                               {"v", a.v},
                               {"out", a.out},
                               {"lse", a.lse},
                               {"cu_seqlens_q", a.cu_seqlens_q},
                               {"cu_seqlens_kv", a.cu_seqlens_kv},
                               {"dq", a.dq},
                               {"dk", a.dk},
                               {"dv", a.dv}});
}

}  // namespace

void flash_attn(const FlashAttnArgs& args, const Launch& launch) {
  check_args(args);
  if (args.lse.numel() == 0) return;
  forward(args, args.q.device, launch);
}

std::size_t flash_attn_workspace(const FlashAttnArgs&) { return 0; }

void flash_attn_backward(const FlashAttnBackwardArgs& args, const Launch& launch) {
  check_args(args);
  // No early return without queries: dk and dv must still become zero.
  backward(args, args.q.device, launch);
}

std::size_t flash_attn_backward_workspace(const FlashAttnBackwardArgs&) { return 0; }

}  // namespace dsm
