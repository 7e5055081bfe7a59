// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <cmath>
#include <vector>

#include "src/core/parallel_for.h"
#include "src/cpu/convert.h"
#include "src/cpu/kv_rows.h"
#include "src/cpu/lane_sum.h"
#include "src/cpu/visit_dtype.h"
#include "src/kv_cache/placements.h"
#include "src/kv_cache/v4_kv_insert/v4_kv_insert.h"
#include "src/numerics/float_traits.h"
#include "src/numerics/rope.h"

namespace dsm {
namespace {

constexpr std::int64_t kGrainRows = 32;

/// x rounded to T's precision.
template <class T>
Compute<T> rounded(Compute<T> x) {
  return widen(narrow<T>(x));
}

/// As the operator rms_norm, to the bit.
template <class T>
void normalize(const std::vector<Compute<T>>& weight, double eps, std::vector<Compute<T>>& row) {
  using A = Compute<T>;
  const std::int64_t width = static_cast<std::int64_t>(row.size());
  const A squares = cpu::lane_sum<A>(width, [&](std::int64_t i) { return row[i] * row[i]; });
  const A rstd = A(1) / std::sqrt(squares / static_cast<A>(width) + static_cast<A>(eps));
  for (std::int64_t i = 0; i < width; ++i) row[i] = rounded<T>(row[i] * rstd * weight[i]);
}

/// As the operator rope, to the bit.
template <class T>
void turn(std::int64_t position, const TensorView& inv_freq, std::vector<Compute<T>>& row) {
  using A = Compute<T>;
  const std::int64_t pairs = inv_freq.size(0);
  A* x = row.data() + row.size() - 2 * pairs;
  for (std::int64_t i = 0; i < pairs; ++i) {
    rotate(rope_rotation<A>(rope_angle(position, inv_freq.as<const float>()[i])), x[2 * i], x[2 * i + 1]);
    x[2 * i] = rounded<T>(x[2 * i]);
    x[2 * i + 1] = rounded<T>(x[2 * i + 1]);
  }
}

template <class T>
void insert(const V4KvInsertArgs& a) {
  using A = Compute<T>;
  const std::int64_t width = a.kv.size(1);
  const cpu::KvRows cache(a.cache);
  const std::vector<Placement> list = placements(a.slots, cache.rows());
  std::vector<A> weight(a.weight ? width : 0);
  if (a.weight) cpu::widen(a.weight.data, a.weight.dtype, width, weight.data());
  parallel_for(0, static_cast<std::int64_t>(list.size()), kGrainRows, [&](std::int64_t begin, std::int64_t end) {
    std::vector<A> row(width);
    for (std::int64_t i = begin; i < end; ++i) {
      const auto [slot, token] = list[i];
      cpu::widen_row(a.kv, token, row.data());
      if (a.weight) normalize<T>(weight, a.eps, row);
      if (a.positions) turn<T>(a.positions.as<const std::int64_t>()[token], a.inv_freq, row);
      cache.write(slot, row.data());
    }
  });
}

}  // namespace

void v4_kv_insert_cpu(const V4KvInsertArgs& args, const Launch&) {
  cpu::visit_floating(args.kv.dtype, [&]<class T>() { insert<T>(args); });
}

}  // namespace dsm
