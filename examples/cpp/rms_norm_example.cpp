// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
//
// A C++ program that uses the installed library: find_package(dsm), target dsm::dsm, #include <dsm/dsm.h>.
#include <dsm/dsm.h>

#include <cmath>
#include <cstdio>
#include <vector>

int main() {
  std::vector<float> x = {3, 4, 0, 0}, weight = {1, 1, 2, 2}, y(4), rstd(1);
  dsm::rms_norm({.x = {x.data(), dsm::DType::float32, {1, 4}},
                 .weight = {weight.data(), dsm::DType::float32, {4}},
                 .eps = 0,
                 .y = {y.data(), dsm::DType::float32, {1, 4}},
                 .rstd = {rstd.data(), dsm::DType::float32, {1}}});
  std::printf("dsm %s: rms_norm(3, 4, 0, 0) = (%g, %g, %g, %g)\n", DSM_VERSION, y[0], y[1], y[2], y[3]);
  if (std::abs(y[0] - 1.2f) > 1e-6f || std::abs(y[1] - 1.6f) > 1e-6f) return 1;

  try {
    weight.push_back(0);
    dsm::rms_norm({.x = {x.data(), dsm::DType::float32, {1, 4}},
                   .weight = {weight.data(), dsm::DType::float32, {5}},
                   .y = {y.data(), dsm::DType::float32, {1, 4}},
                   .rstd = {rstd.data(), dsm::DType::float32, {1}}});
  } catch (const dsm::Error& error) {
    std::printf("refused as it should be: %s\n", error.what());
    return error.argument() == "weight" ? 0 : 1;
  }
  return 1;
}
