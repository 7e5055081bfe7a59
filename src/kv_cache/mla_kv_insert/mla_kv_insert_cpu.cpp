// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <vector>

#include "src/core/parallel_for.h"
#include "src/cpu/convert.h"
#include "src/cpu/kv_rows.h"
#include "src/kv_cache/mla_kv_insert/mla_kv_insert.h"
#include "src/kv_cache/placements.h"

namespace dsm {
namespace {

constexpr std::int64_t kGrainRows = 32;

template <class A>
void insert(const MlaKvInsertArgs& a) {
  const std::int64_t d_latent = a.latent.size(1), d_rope = a.k_pe.size(1);
  const cpu::KvRows cache(a.cache);
  const std::vector<Placement> list = placements(a.slots, cache.rows());
  parallel_for(0, static_cast<std::int64_t>(list.size()), kGrainRows, [&](std::int64_t begin, std::int64_t end) {
    std::vector<A> row(d_latent + d_rope);
    for (std::int64_t i = begin; i < end; ++i) {
      const auto [slot, token] = list[i];
      cpu::widen_row(a.latent, token, row.data());
      cpu::widen_row(a.k_pe, token, row.data() + d_latent);
      cache.write(slot, row.data(), a.scales);
    }
  });
}

}  // namespace

void mla_kv_insert_cpu(const MlaKvInsertArgs& args, const Launch&) {
  args.latent.dtype == DType::float64 ? insert<double>(args) : insert<float>(args);
}

}  // namespace dsm
