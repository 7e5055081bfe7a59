// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <string>
#include <vector>

#include "dsm/export.h"

namespace dsm {

/// One operator and its implementations, best first.
struct OperatorInfo {
  struct Row {
    /// "cpu" (the specification), "cuda" (sm_80 and newer), "sm90" (tuned for Hopper), or "prefill": by that operator
    std::string name;
    bool built;  ///< false when this build leaves the implementation out
  };
  std::string family;
  std::string name;
  std::vector<Row> implementations;
};

/// All operators, sorted by family and name.
DSM_API std::vector<OperatorInfo> operators();

/// One choice made by the registry.
struct Choice {
  struct Rejection {
    std::string implementation;
    std::string reason;
  };
  std::string operation;
  std::string implementation;         ///< empty when no implementation accepted
  std::vector<Rejection> rejections;  ///< the rows asked before, in order
};

/// Starts (and clears) or stops recording the choices of every operator call in this process.
DSM_API void record_choices(bool on);

/// The choices recorded since record_choices(true), in call order; consecutive equal ones once.
DSM_API std::vector<Choice> recorded_choices();

/// Makes an operator use one implementation, e.g. "rms_norm", "cpu"; an empty implementation lifts it. The
/// environment variable DSM_FORCE_IMPL="op:name,op:name", read when the library is loaded, does the same.
/// Throws dsm::Error for unknown names.
DSM_API void force_implementation(const std::string& operation, const std::string& implementation);

/// The instruction set that the CPU implementations run with, chosen by the processor when the library is loaded:
/// "avx512", "avx2" or "baseline" (what every processor of the architecture has).
DSM_API const char* cpu_instruction_set();

}  // namespace dsm
