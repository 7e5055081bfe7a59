// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/cpu/kernels.h"

#include "dsm/registry.h"

namespace dsm::cpu {
namespace {

const IsaKernels& table(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) return kAvx512Kernels;
  if (isa == Isa::avx2) return kAvx2Kernels;
#endif
  return kBaselineKernels;
}

const IsaKernels& best() {
  if (supported(Isa::avx512)) return table(Isa::avx512);
  return table(supported(Isa::avx2) ? Isa::avx2 : Isa::baseline);
}

const IsaKernels*& chosen() {
  static const IsaKernels* kernels = &best();
  return kernels;
}

}  // namespace

bool supported(Isa isa) {
  if (isa == Isa::baseline) return true;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == Isa::avx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

void set_isa_for_test(Isa isa) { chosen() = &table(isa); }

template <>
const Kernels<float>& kernels() {
  return chosen()->f32;
}

template <>
const Kernels<double>& kernels() {
  return chosen()->f64;
}

}  // namespace dsm::cpu

namespace dsm {

const char* cpu_instruction_set() {
  const cpu::IsaKernels* used = cpu::chosen();
  if (used == &cpu::kBaselineKernels) return "baseline";
  return used == &cpu::table(cpu::Isa::avx2) ? "avx2" : "avx512";
}

}  // namespace dsm
