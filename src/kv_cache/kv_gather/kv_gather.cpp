// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/kv_cache/kv_gather/kv_gather.h"

#include <cstdint>

#include "src/core/kv_cache.h"
#include "src/core/registry.h"

namespace dsm {
namespace {

Reason fits_cuda(const KvGatherArgs& a) {
  return a.out.size(1) > kMaxCudaWidth ? "takes rows of at most " + std::to_string(kMaxCudaWidth) + " values" : "";
}

const Operator<KvGatherArgs> gather("kv_cache", "kv_gather",
                                    {{"cuda", DeviceType::cuda, DSM_CUDA_ROW(kv_gather_cuda), fits_cuda},
                                     {"cpu", DeviceType::cpu, kv_gather_cpu}});

void check_args(const KvGatherArgs& a) {
  const Check check("kv_gather");
  check_kv_cache(check, "cache", a.cache);
  if (a.indices) check.contiguous("indices", a.indices, "[count]", {Check::kAny}, {DType::int32});
  const std::int64_t rows = a.cache.size(0) * a.cache.size(1), count = a.indices ? a.indices.size(0) : rows;
  check.that(a.indices || rows <= INT32_MAX, "indices", "given for more than 2^31 - 1 rows", rows);
  check.contiguous("out", a.out, "[count, width]", {count, kv_width(a.cache)}, kFloating);
  check.on_device(a.cache.device, {{"indices", a.indices}, {"out", a.out}});
}

}  // namespace

void kv_gather(const KvGatherArgs& args, const Launch& launch) {
  check_args(args);
  if (args.out.numel() == 0) return;
  gather(args, args.cache.device, launch);
}

}  // namespace dsm
