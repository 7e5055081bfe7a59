// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "src/cpu/kernels.h"

namespace dsm::cpu {

/// Runs a test with the kernels of one instruction set; skips it where the processor lacks them.
class EachIsa : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    if (!supported(GetParam())) GTEST_SKIP() << "this processor lacks the instruction set";
    set_isa_for_test(GetParam());
  }
  void TearDown() override {
    for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512})
      if (supported(isa)) set_isa_for_test(isa);
  }
};

inline std::string isa_name(const testing::TestParamInfo<Isa>& info) {
  constexpr const char* names[] = {"baseline", "avx2", "avx512"};
  return names[static_cast<int>(info.param)];
}

#define DSM_INSTANTIATE_FOR_EACH_ISA(Suite) \
  INSTANTIATE_TEST_SUITE_P(Cpu, Suite, testing::Values(Isa::baseline, Isa::avx2, Isa::avx512), isa_name)

}  // namespace dsm::cpu
