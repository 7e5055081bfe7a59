// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/cpu/convert.h"

#include <algorithm>

#include "src/cpu/kernels.h"

namespace dsm::cpu {

template <class T>
void widen(const void* x, DType dtype, std::int64_t n, T* out) {
  const Kernels<T>& kernel = kernels<T>();
  // The kernel writes whole vectors; the last one must not run over the end of out.
  const std::int64_t whole = n / kernel.lanes * kernel.lanes, rest = n - whole;
  if (whole > 0) kernel.widen({x, dtype, 0, 1}, 1, whole, out, whole);
  if (rest == 0) return;
  T last[64 / sizeof(T)];
  kernel.widen({static_cast<const char*>(x) + whole * element_size(dtype), dtype, 0, 1}, 1, rest, last, kernel.lanes);
  std::copy_n(last, rest, out + whole);
}

template <class T>
void narrow(const T* x, std::int64_t n, void* out, DType dtype) {
  kernels<T>().narrow(x, n, out, dtype);
}

template void widen(const void*, DType, std::int64_t, float*);
template void widen(const void*, DType, std::int64_t, double*);
template void narrow(const float*, std::int64_t, void*, DType);
template void narrow(const double*, std::int64_t, void*, DType);

}  // namespace dsm::cpu
