// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <algorithm>
#include <vector>

#include "src/core/checks.h"
#include "src/core/parallel_for.h"
#include "src/cpu/convert.h"
#include "src/cpu/vector_math.h"
#include "src/cpu/visit_dtype.h"
#include "src/moe/moe_combine/moe_combine.h"
#include "src/numerics/float_traits.h"

namespace dsm {
namespace {

constexpr std::int64_t kGrainElements = 16384;

std::int64_t row_grain(std::int64_t columns) {
  return std::max<std::int64_t>(1, kGrainElements / std::max<std::int64_t>(1, columns));
}

void check_row(const Check& check, std::int32_t row, std::int64_t rows) {
  check.that(row < rows, "row_of_slot", "below the number of rows, " + std::to_string(rows), row);
}

template <class T>
void forward(const MoeCombineArgs& a) {
  using A = Compute<T>;
  const std::int64_t tokens = a.y.size(0), hidden = a.y.size(1), topk = a.row_of_slot.size(1);
  const std::int32_t* row_of_slot = a.row_of_slot.as<const std::int32_t>();
  for (std::int64_t i = 0; i < tokens * topk; ++i) check_row(Check("moe_combine"), row_of_slot[i], a.rows.size(0));
  parallel_for(0, tokens, row_grain(hidden * topk), [&](std::int64_t begin, std::int64_t end) {
    std::vector<A> sum(hidden), row(hidden);
    std::vector<std::int64_t> slots(topk);
    for (std::int64_t t = begin; t < end; ++t) {
      for (std::int64_t k = 0; k < topk; ++k) slots[k] = t * topk + k;
      std::stable_sort(slots.begin(), slots.end(),
                       [&](std::int64_t i, std::int64_t j) { return row_of_slot[i] < row_of_slot[j]; });
      std::fill(sum.begin(), sum.end(), A(0));
      for (const std::int64_t slot : slots) {
        if (row_of_slot[slot] < 0) continue;
        const A weight = a.weights ? a.weights.as<const A>()[slot] : A(1);
        cpu::widen(a.rows.as<const T>() + row_of_slot[slot] * hidden, a.rows.dtype, hidden, row.data());
        for (std::int64_t h = 0; h < hidden; ++h) sum[h] += weight * row[h];
      }
      if (a.shared) {
        cpu::widen(a.shared.as<const T>() + t * hidden, a.shared.dtype, hidden, row.data());
        for (std::int64_t h = 0; h < hidden; ++h) sum[h] += row[h];
      }
      cpu::narrow(sum.data(), hidden, a.y.as<T>() + t * hidden, a.y.dtype);
    }
  });
}

/// The slot that names each row, -1 where none does.
std::vector<std::int32_t> slots_of_rows(const MoeCombineBackwardArgs& a) {
  const Check check("moe_combine_backward");
  std::vector<std::int32_t> slot_of_row(a.rows.size(0), -1);
  for (std::int64_t slot = 0; slot < a.row_of_slot.numel(); ++slot) {
    const std::int32_t row = a.row_of_slot.as<const std::int32_t>()[slot];
    if (row < 0) continue;
    check_row(check, row, a.rows.size(0));
    check.that(slot_of_row[row] < 0, "row_of_slot", "free of repetitions", "row " + std::to_string(row) + " twice");
    slot_of_row[row] = static_cast<std::int32_t>(slot);
  }
  return slot_of_row;
}

template <class T>
void backward(const MoeCombineBackwardArgs& a) {
  using A = Compute<T>;
  const std::int64_t hidden = a.rows.size(1), topk = a.row_of_slot.size(1);
  const std::vector<std::int32_t> slot_of_row = slots_of_rows(a);
  if (a.dweights) std::fill_n(a.dweights.as<A>(), a.dweights.numel(), A(0));
  parallel_for(0, a.rows.size(0), row_grain(hidden), [&](std::int64_t begin, std::int64_t end) {
    std::vector<A> dy(hidden), row(hidden);
    for (std::int64_t r = begin; r < end; ++r) {
      const std::int32_t slot = slot_of_row[r];
      if (slot < 0) {
        std::fill_n(a.drows.as<T>() + r * hidden, hidden, T{});
        continue;
      }
      cpu::widen(a.dy.as<const T>() + slot / topk * hidden, a.dy.dtype, hidden, dy.data());
      if (a.weights) {
        cpu::widen(a.rows.as<const T>() + r * hidden, a.rows.dtype, hidden, row.data());
        a.dweights.as<A>()[slot] = cpu::dot(dy.data(), row.data(), hidden);
        cpu::scale(dy.data(), hidden, a.weights.as<const A>()[slot]);
      }
      cpu::narrow(dy.data(), hidden, a.drows.as<T>() + r * hidden, a.drows.dtype);
    }
  });
}

}  // namespace

void moe_combine_cpu(const MoeCombineArgs& args, const Launch&) {
  cpu::visit_floating(args.rows.dtype, [&]<class T>() { forward<T>(args); });
}

void moe_combine_backward_cpu(const MoeCombineBackwardArgs& args, const Launch&) {
  cpu::visit_floating(args.rows.dtype, [&]<class T>() { backward<T>(args); });
}

}  // namespace dsm
