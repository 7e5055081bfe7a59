// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <algorithm>

#include "src/core/parallel_for.h"
#include "src/cpu/convert.h"
#include "src/cpu/swiglu_row.h"
#include "src/cpu/visit_dtype.h"
#include "src/moe/swiglu/swiglu.h"
#include "src/numerics/float_traits.h"

namespace dsm {
namespace {

// Columns that are widened, computed and rounded at a time, and elements of a row range for one thread.
constexpr std::int64_t kPart = 512, kGrainElements = 8192;

/// Calls body(row, first column, columns) over all parts of [rows, columns].
template <class Body>
void over_parts(std::int64_t rows, std::int64_t columns, const Body& body) {
  parallel_for(0, rows, std::max<std::int64_t>(1, kGrainElements / columns), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row)
      for (std::int64_t column = 0; column < columns; column += kPart)
        body(row, column, std::min(kPart, columns - column));
  });
}

template <class T>
void forward(const SwigluArgs& a) {
  using A = Compute<T>;
  const std::int64_t columns = a.y.size(1);
  over_parts(a.z.size(0), columns, [&](std::int64_t row, std::int64_t column, std::int64_t n) {
    const T* gate = a.z.as<const T>() + row * a.z.stride[0] + column;
    A g[kPart], u[kPart];
    cpu::widen(gate, a.z.dtype, n, g);
    cpu::widen(gate + columns, a.z.dtype, n, u);
    cpu::swiglu_row(g, u, n, static_cast<A>(a.limit), g);
    cpu::narrow(g, n, a.y.as<T>() + row * columns + column, a.y.dtype);
  });
}

template <class T>
void backward(const SwigluBackwardArgs& a) {
  using A = Compute<T>;
  const std::int64_t columns = a.dy.size(1);
  over_parts(a.z.size(0), columns, [&](std::int64_t row, std::int64_t column, std::int64_t n) {
    const T* gate = a.z.as<const T>() + row * a.z.stride[0] + column;
    T* dgate = a.dz.as<T>() + row * 2 * columns + column;
    A dy[kPart], g[kPart], u[kPart];
    cpu::widen(a.dy.as<const T>() + row * a.dy.stride[0] + column, a.dy.dtype, n, dy);
    cpu::widen(gate, a.z.dtype, n, g);
    cpu::widen(gate + columns, a.z.dtype, n, u);
    cpu::swiglu_backward_row(dy, A(1), g, u, n, static_cast<A>(a.limit), dy, g, u);
    cpu::narrow(g, n, dgate, a.dz.dtype);
    cpu::narrow(u, n, dgate + columns, a.dz.dtype);
  });
}

}  // namespace

void swiglu_cpu(const SwigluArgs& args, const Launch&) {
  cpu::visit_floating(args.z.dtype, [&]<class T>() { forward<T>(args); });
}

void swiglu_backward_cpu(const SwigluBackwardArgs& args, const Launch&) {
  cpu::visit_floating(args.z.dtype, [&]<class T>() { backward<T>(args); });
}

}  // namespace dsm
