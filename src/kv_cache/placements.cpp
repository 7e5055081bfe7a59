// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/kv_cache/placements.h"

#include <algorithm>
#include <tuple>

namespace dsm {

std::vector<Placement> placements(const TensorView& slots, std::int64_t rows) {
  std::vector<Placement> all;
  all.reserve(slots.numel());
  for (std::int64_t token = 0; token < slots.numel(); ++token) {
    const std::int64_t slot = slots.as<const std::int64_t>()[token];
    if (slot >= 0 && slot < rows) all.push_back({slot, token});
  }
  // The last token first, which is the one that unique keeps.
  std::sort(all.begin(), all.end(), [](const Placement& a, const Placement& b) {
    return std::tuple(a.slot, -a.token) < std::tuple(b.slot, -b.token);
  });
  const auto same_slot = [](const Placement& a, const Placement& b) { return a.slot == b.slot; };
  all.erase(std::unique(all.begin(), all.end(), same_slot), all.end());
  return all;
}

std::size_t placements_workspace(const TensorView& slots, const TensorView& cache) {
  if (slots.device.type != DeviceType::cuda || slots.numel() <= kMaxUnmarkedTokens || cache.numel() == 0) return 0;
  return static_cast<std::size_t>(cache.size(0) * cache.size(1)) * sizeof(std::int32_t);
}

std::string too_many_for_cuda(const TensorView& slots) {
  return slots.numel() > kMaxCudaTokens ? "takes at most " + std::to_string(kMaxCudaTokens) + " tokens" : "";
}

}  // namespace dsm
