// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <vector>

#include "src/core/parallel_for.h"
#include "src/cpu/lane_sum.h"
#include "src/cpu/visit_dtype.h"
#include "src/norm_rope/rms_norm/rms_norm.h"
#include "src/numerics/float_traits.h"

namespace dsm {
namespace {

// Rows whose elements add up to about this many go to one thread at a time.
constexpr std::int64_t kGrainElements = 16384;
// Partial sums of dweight are kept per block of rows and added in float64 in block order, whatever thread made them.
constexpr std::int64_t kRowsPerBlock = 64;

std::int64_t row_grain(std::int64_t hidden) {
  return std::max<std::int64_t>(1, kGrainElements / std::max<std::int64_t>(1, hidden));
}

/// The weight widened to the type computed in; ones when absent.
template <class A>
std::vector<A> widened_weight(const TensorView& weight, std::int64_t hidden) {
  std::vector<A> wide(hidden, A(1));
  if (!weight) return wide;
  cpu::visit_floating(weight.dtype, [&]<class W>() {
    for (std::int64_t i = 0; i < hidden; ++i) wide[i] = static_cast<A>(widen(weight.as<const W>()[i]));
  });
  return wide;
}

template <class T>
void forward(const RmsNormArgs& a) {
  using A = Compute<T>;
  const std::int64_t hidden = a.x.size(1);
  const std::vector<A> weight = widened_weight<A>(a.weight, hidden);
  parallel_for(0, a.x.size(0), row_grain(hidden), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const T* x = a.x.as<const T>() + row * a.x.stride[0];
      T* y = a.y.as<T>() + row * hidden;
      const A squares = cpu::lane_sum<A>(hidden, [&](std::int64_t i) { return widen(x[i]) * widen(x[i]); });
      const A rstd = A(1) / std::sqrt(squares / static_cast<A>(hidden) + static_cast<A>(a.eps));
      a.rstd.as<A>()[row] = rstd;
      for (std::int64_t i = 0; i < hidden; ++i) y[i] = narrow<T>(widen(x[i]) * rstd * weight[i]);
    }
  });
}

template <class T>
void backward(const RmsNormBackwardArgs& a) {
  using A = Compute<T>;
  const std::int64_t rows = a.x.size(0), hidden = a.x.size(1);
  const std::vector<A> weight = widened_weight<A>(a.weight, hidden);
  const std::int64_t blocks = (rows + kRowsPerBlock - 1) / kRowsPerBlock;
  std::vector<A> dweight(a.dweight ? blocks * hidden : 0);
  parallel_for(0, blocks, std::max<std::int64_t>(1, row_grain(hidden) / kRowsPerBlock),
               [&](std::int64_t b, std::int64_t e) {
                 for (std::int64_t row = b * kRowsPerBlock; row < std::min(e * kRowsPerBlock, rows); ++row) {
                   const T* x = a.x.as<const T>() + row * a.x.stride[0];
                   const T* dy = a.dy.as<const T>() + row * a.dy.stride[0];
                   T* dx = a.dx.as<T>() + row * hidden;
                   const A rstd = a.rstd.as<const A>()[row];
                   const A dot =
                       cpu::lane_sum<A>(hidden, [&](std::int64_t i) { return widen(dy[i]) * weight[i] * widen(x[i]); });
                   const A pull = dot / static_cast<A>(hidden) * rstd * rstd;
                   for (std::int64_t i = 0; i < hidden; ++i)
                     dx[i] = narrow<T>(rstd * (widen(dy[i]) * weight[i] - widen(x[i]) * pull));
                   if (!a.dweight) continue;
                   A* partial = dweight.data() + row / kRowsPerBlock * hidden;
                   for (std::int64_t i = 0; i < hidden; ++i) partial[i] += widen(dy[i]) * (widen(x[i]) * rstd);
                 }
               });
  if (!a.dweight) return;
  cpu::visit_floating(a.dweight.dtype, [&]<class W>() {
    parallel_for(0, hidden, 1024, [&](std::int64_t b, std::int64_t e) {
      for (std::int64_t i = b; i < e; ++i) {
        double sum = 0;
        for (std::int64_t block = 0; block < blocks; ++block) sum += dweight[block * hidden + i];
        a.dweight.as<W>()[i] = narrow<W>(static_cast<Compute<W>>(sum));
      }
    });
  });
}

}  // namespace

void rms_norm_cpu(const RmsNormArgs& args, const Launch&) {
  cpu::visit_floating(args.x.dtype, [&]<class T>() { forward<T>(args); });
}

void rms_norm_backward_cpu(const RmsNormBackwardArgs& args, const Launch&) {
  cpu::visit_floating(args.x.dtype, [&]<class T>() { backward<T>(args); });
}

}  // namespace dsm
