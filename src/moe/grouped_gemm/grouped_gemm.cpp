// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/moe/grouped_gemm/grouped_gemm.h"

#include <tuple>

#include "src/core/checks.h"
#include "src/core/registry.h"
#include "src/core/weight_checks.h"

namespace dsm {
namespace {

const Operator<GroupedGemmArgs> forward("moe", "grouped_gemm", {{"cpu", DeviceType::cpu, grouped_gemm_cpu}});
const Operator<GroupedGemmBackwardArgs> backward("moe", "grouped_gemm_backward",
                                                 {{"cpu", DeviceType::cpu, grouped_gemm_backward_cpu}});

/// Checks what both directions share; returns n. Args is GroupedGemmArgs or GroupedGemmBackwardArgs.
template <class Args>
std::int64_t check_operands(const Check& check, const Args& args) {
  const auto& [a, b, expert_offsets, transpose_b] = std::tie(args.a, args.b, args.expert_offsets, args.transpose_b);
  check.tensor("a", a, "[rows, k]", {Check::kAny, Check::kAny}, kFloating);
  check.unit_last_stride("a", a);
  const std::int64_t k = a.size(1);
  check.that(transpose_b || !args.b_scales, "transpose_b", "true for quantised b", "false");
  if (transpose_b)
    check_weight(check, "b", b, args.b_scales, "[experts, n, k]", {Check::kAny, Check::kAny, k}, a.dtype);
  else
    check.contiguous("b", b, "[experts, k, n]", {Check::kAny, k, Check::kAny}, {a.dtype});
  check.contiguous("expert_offsets", expert_offsets, "[experts + 1]", {b.size(0) + 1}, {DType::int32});
  return b.size(transpose_b ? 1 : 2);
}

void check_args(const GroupedGemmArgs& a) {
  const Check check("grouped_gemm");
  const std::int64_t n = check_operands(check, a);
  check.contiguous("c", a.c, "[rows, n]", {a.a.size(0), n}, {a.a.dtype});
  check.on_device(a.a.device, {{"b", a.b}, {"expert_offsets", a.expert_offsets}, {"c", a.c}});
}

void check_args(const GroupedGemmBackwardArgs& a) {
  const Check check("grouped_gemm_backward");
  const std::int64_t rows = a.a ? a.a.size(0) : 0;
  const std::int64_t n = check_operands(check, a);
  check.tensor("dc", a.dc, "[rows, n]", {rows, n}, {a.a.dtype});
  check.unit_last_stride("dc", a.dc);
  if (a.da) check.contiguous("da", a.da, "[rows, k]", {rows, a.a.size(1)}, {a.a.dtype});
  check.that(!a.db || !a.b_scales, "db", "absent for quantised b", describe(a.db));
  if (a.db) check.contiguous("db", a.db, "b's shape", {a.b.size(0), a.b.size(1), a.b.size(2)}, {a.a.dtype});
  check.on_device(a.a.device,
                  {{"b", a.b}, {"expert_offsets", a.expert_offsets}, {"dc", a.dc}, {"da", a.da}, {"db", a.db}});
}

}  // namespace

void grouped_gemm(const GroupedGemmArgs& args, const Launch& launch) {
  check_args(args);
  if (args.c.numel() == 0) return;
  forward(args, args.a.device, launch);
}

void grouped_gemm_backward(const GroupedGemmBackwardArgs& args, const Launch& launch) {
  check_args(args);
  backward(args, args.a.device, launch);  // also without rows: db must become zero
}

}  // namespace dsm
