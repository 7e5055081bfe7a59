// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "dsm/error.h"

#include <utility>

namespace dsm {

Error::Error(std::string operation, std::string argument, std::string expected, std::string got)
    : std::invalid_argument(operation + ": " + argument + " must be " + expected + ", got " + got),
      operation_(std::move(operation)),
      argument_(std::move(argument)),
      expected_(std::move(expected)),
      got_(std::move(got)) {}

Error::~Error() = default;

}  // namespace dsm
