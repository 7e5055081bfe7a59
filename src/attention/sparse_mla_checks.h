// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <string>

#include "src/attention/key_count.h"
#include "src/core/checks.h"

namespace dsm::attention {

/// The dtype of an attention operator's statistics.
inline DType statistics_dtype(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

/// What both passes of sparse_mla take in. `a` is SparseMlaPrefillArgs or SparseMlaBackwardArgs.
template <class Args>
void check_sparse_mla_inputs(const Check& check, const Args& a) {
  constexpr std::int64_t any = Check::kAny;
  check.tensor("q", a.q, "[s_q, h_q, d_qk]", {any, any, any}, kFloating);
  check.tensor("kv", a.kv, "[s_kv, h_kv, d_qk]", {any, any, a.q.size(2)}, {a.q.dtype});
  const std::int64_t s_q = a.q.size(0), h_q = a.q.size(1), h_kv = a.kv.size(1);
  check.that(h_kv > 0 && h_q % h_kv == 0, "h_q", "a multiple of h_kv = " + std::to_string(h_kv), h_q);
  check.tensor("indices", a.indices, "[s_q, h_kv, topk]", {s_q, h_kv, any}, {DType::int32});
  check.unit_last_stride("q", a.q);
  check.unit_last_stride("kv", a.kv);
  check.unit_last_stride("indices", a.indices);
  check_key_count(check, "indices", a.indices.size(2));
  if (a.attn_sink) check.contiguous("attn_sink", a.attn_sink, "[h_q]", {h_q}, {statistics_dtype(a.q.dtype)});
  if (a.topk_length) check.contiguous("topk_length", a.topk_length, "[s_q]", {s_q}, {DType::int32});
  check.that(std::isfinite(a.softmax_scale), "softmax_scale", "finite", std::to_string(a.softmax_scale));
  check.on_device(a.q.device, {{"kv", a.kv},
                               {"indices", a.indices},
                               {"attn_sink", a.attn_sink},
                               {"topk_length", a.topk_length},
                               {"out", a.out},
                               {"lse", a.lse}});
}

}  // namespace dsm::attention
