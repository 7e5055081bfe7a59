// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <vector>

#include "src/core/parallel_for.h"
#include "src/cpu/convert.h"
#include "src/cpu/vector_math.h"
#include "src/norm_rope/rotate_cpu.h"
#include "src/norm_rope/v4_q_norm_rope/v4_q_norm_rope.h"

namespace dsm {
namespace {

// Heads whose elements add up to about this many go to one thread at a time.
constexpr std::int64_t kGrainElements = 8192;

const void* head_of(const TensorView& tensor, std::int64_t token, std::int64_t head) {
  const std::int64_t offset = token * tensor.stride[0] + head * tensor.stride[1];
  return tensor.as<const char>() + offset * static_cast<std::int64_t>(element_size(tensor.dtype));
}

void* head_of_result(const TensorView& tensor, std::int64_t index) {
  return tensor.as<char>() + index * tensor.size(2) * static_cast<std::int64_t>(element_size(tensor.dtype));
}

template <class A>
void forward(const V4QNormRopeArgs& a) {
  const std::int64_t heads = a.q.size(1), d = a.q.size(2);
  parallel_for(0, a.q.size(0) * heads, std::max<std::int64_t>(1, kGrainElements / d),
               [&](std::int64_t begin, std::int64_t end) {
                 TokenRotations<A> rotations(a.positions, a.inv_freq, false);
                 std::vector<A> x(d);
                 for (std::int64_t i = begin; i < end; ++i) {
                   cpu::widen(head_of(a.q, i / heads, i % heads), a.q.dtype, d, x.data());
                   const A square = cpu::dot(x.data(), x.data(), d) / static_cast<A>(d);
                   const A rstd = 1 / std::sqrt(square + static_cast<A>(a.eps));
                   a.rstd.as<A>()[i] = rstd;
                   cpu::scale(x.data(), d, rstd);
                   rotate_head(rotations.of(i / heads), x.data(), d);
                   cpu::narrow(x.data(), d, head_of_result(a.y, i), a.y.dtype);
                 }
               });
}

template <class A>
void backward(const V4QNormRopeBackwardArgs& a) {
  const std::int64_t heads = a.q.size(1), d = a.q.size(2);
  parallel_for(0, a.q.size(0) * heads, std::max<std::int64_t>(1, kGrainElements / d),
               [&](std::int64_t begin, std::int64_t end) {
                 TokenRotations<A> rotations(a.positions, a.inv_freq, true);
                 std::vector<A> g(d), x(d);
                 for (std::int64_t i = begin; i < end; ++i) {
                   cpu::widen(head_of(a.dy, i / heads, i % heads), a.dy.dtype, d, g.data());
                   cpu::widen(head_of(a.q, i / heads, i % heads), a.q.dtype, d, x.data());
                   rotate_head(rotations.of(i / heads), g.data(), d);
                   const A rstd = a.rstd.as<const A>()[i];
                   const A pull = cpu::dot(g.data(), x.data(), d) / static_cast<A>(d) * rstd * rstd;
                   for (std::int64_t k = 0; k < d; ++k) g[k] = rstd * (g[k] - x[k] * pull);
                   cpu::narrow(g.data(), d, head_of_result(a.dq, i), a.dq.dtype);
                 }
               });
}

}  // namespace

void v4_q_norm_rope_cpu(const V4QNormRopeArgs& args, const Launch&) {
  args.q.dtype == DType::float64 ? forward<double>(args) : forward<float>(args);
}

void v4_q_norm_rope_backward_cpu(const V4QNormRopeBackwardArgs& args, const Launch&) {
  args.q.dtype == DType::float64 ? backward<double>(args) : backward<float>(args);
}

}  // namespace dsm
