// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/kv_cache/v4_kv_insert/v4_kv_insert.h"

#include "src/core/kv_cache.h"
#include "src/core/registry.h"
#include "src/kv_cache/placements.h"

namespace dsm {
namespace {

Reason fits_cuda(const V4KvInsertArgs& a) { return too_many_for_cuda(a.slots); }

const Operator<V4KvInsertArgs> insert("kv_cache", "v4_kv_insert",
                                      {{"cuda", DeviceType::cuda, DSM_CUDA_ROW(v4_kv_insert_cuda), fits_cuda},
                                       {"cpu", DeviceType::cpu, v4_kv_insert_cpu}});

void check_args(const V4KvInsertArgs& a) {
  const Check check("v4_kv_insert");
  check.tensor("kv", a.kv, "[tokens, width]", {Check::kAny, Check::kAny}, kFloating);
  const std::int64_t tokens = a.kv.size(0), width = a.kv.size(1);
  check.unit_last_stride("kv", a.kv);
  check.contiguous("slots", a.slots, "[tokens]", {tokens}, {DType::int64});
  check_kv_cache(check, "cache", a.cache, {KvFormat::v4_fp8, KvFormat::v41_fp8, KvFormat::v41_fp4});
  check.that(width == kv_width(a.cache), "kv", "of the cache's width, " + std::to_string(kv_width(a.cache)), width);
  if (a.weight) {
    const DType wide = a.kv.dtype == DType::float64 ? DType::float64 : DType::float32;
    check.contiguous("weight", a.weight, "[width]", {width}, {a.kv.dtype, wide});
  }
  check.that(a.eps >= 0, "eps", "at least 0", std::to_string(a.eps));
  check.that(bool(a.positions) == bool(a.inv_freq), "positions", "given exactly when inv_freq is",
             describe(a.positions));
  if (a.positions) {
    check.contiguous("positions", a.positions, "[tokens]", {tokens}, {DType::int64});
    check.contiguous("inv_freq", a.inv_freq, "[d_rope / 2]", {Check::kAny}, {DType::float32});
    check.that(2 * a.inv_freq.size(0) <= width, "inv_freq",
               "at most width / 2 = " + std::to_string(width / 2) + " long", a.inv_freq.size(0));
  }
  check.on_device(a.kv.device, {{"weight", a.weight},
                                {"positions", a.positions},
                                {"inv_freq", a.inv_freq},
                                {"slots", a.slots},
                                {"cache", a.cache}});
}

}  // namespace

void v4_kv_insert(const V4KvInsertArgs& args, const Launch& launch) {
  check_args(args);
  Check("v4_kv_insert").workspace(launch, v4_kv_insert_workspace(args));
  if (args.slots.numel() == 0 || args.cache.numel() == 0) return;
  insert(args, args.kv.device, launch);
}

std::size_t v4_kv_insert_workspace(const V4KvInsertArgs& args) { return placements_workspace(args.slots, args.cache); }

}  // namespace dsm
