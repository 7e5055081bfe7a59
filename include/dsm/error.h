// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <stdexcept>
#include <string>

#include "dsm/export.h"

namespace dsm {

/// A request that cannot be carried out, thrown before anything is written.
///
/// what() reads "operator: argument must be EXPECTED, got GOT".
class DSM_API Error : public std::invalid_argument {
 public:
  Error(std::string operation, std::string argument, std::string expected, std::string got);
  ~Error() override;

  const std::string& operation() const { return operation_; }
  const std::string& argument() const { return argument_; }
  const std::string& expected() const { return expected_; }
  const std::string& got() const { return got_; }

 private:
  std::string operation_, argument_, expected_, got_;
};

}  // namespace dsm
