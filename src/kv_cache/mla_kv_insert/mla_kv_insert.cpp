// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/kv_cache/mla_kv_insert/mla_kv_insert.h"

#include "src/core/kv_cache.h"
#include "src/core/registry.h"
#include "src/kv_cache/placements.h"

namespace dsm {
namespace {

Reason fits_cuda(const MlaKvInsertArgs& a) { return too_many_for_cuda(a.slots); }

const Operator<MlaKvInsertArgs> insert("kv_cache", "mla_kv_insert",
                                       {{"cuda", DeviceType::cuda, DSM_CUDA_ROW(mla_kv_insert_cuda), fits_cuda},
                                        {"cpu", DeviceType::cpu, mla_kv_insert_cpu}});

void check_args(const MlaKvInsertArgs& a) {
  const Check check("mla_kv_insert");
  check.tensor("latent", a.latent, "[tokens, d_latent]", {Check::kAny, Check::kAny}, kFloating);
  const std::int64_t tokens = a.latent.size(0), d_latent = a.latent.size(1);
  check.unit_last_stride("latent", a.latent);
  check.tensor("k_pe", a.k_pe, "[tokens, d_rope]", {tokens, Check::kAny}, {a.latent.dtype});
  const std::int64_t d_rope = a.k_pe.size(1);
  check.unit_last_stride("k_pe", a.k_pe);
  check.contiguous("slots", a.slots, "[tokens]", {tokens}, {DType::int64});
  check_kv_cache(check, "cache", a.cache, {KvFormat::v32_fp8, KvFormat::v32_nvfp4});
  const std::string got = std::to_string(d_latent) + " + " + std::to_string(d_rope);
  if (kv_format(a.cache))
    check.that(d_latent == 512 && d_rope == 64, "d_latent + d_rope", "512 + 64 for a quantised cache", got);
  else
    check.that(d_latent + d_rope == a.cache.size(3), "d_latent + d_rope",
               "the cache's width, " + std::to_string(a.cache.size(3)), got);
  check.on_device(a.latent.device, {{"k_pe", a.k_pe}, {"slots", a.slots}, {"cache", a.cache}});
}

}  // namespace

void mla_kv_insert(const MlaKvInsertArgs& args, const Launch& launch) {
  check_args(args);
  Check("mla_kv_insert").workspace(launch, mla_kv_insert_workspace(args));
  if (args.slots.numel() == 0 || args.cache.numel() == 0) return;
  insert(args, args.latent.device, launch);
}

std::size_t mla_kv_insert_workspace(const MlaKvInsertArgs& args) {
  return placements_workspace(args.slots, args.cache);
}

}  // namespace dsm
