// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/norm_rope/rope/rope.h"

#include <cmath>

#include "src/core/checks.h"
#include "src/core/registry.h"
#include "src/norm_rope/rotation_checks.h"
#include "src/numerics/rope.h"

namespace dsm {
namespace {

// The CUDA kernel counts the elements of a token in 32 bits, with room for a block's work.
constexpr std::int64_t kMaxCudaTokenElements = std::int64_t{1} << 30;

Reason token_fits(const RopeArgs& args) {
  return args.x.size(1) * args.x.size(2) <= kMaxCudaTokenElements ? "" : "takes at most 2^30 elements per token";
}

const Operator<RopeArgs> forward("norm_rope", "rope",
                                 {{"cuda", DeviceType::cuda, DSM_CUDA_ROW(rope_cuda), token_fits},
                                  {"cpu", DeviceType::cpu, rope_cpu}});

void check_args(const RopeArgs& a) {
  const Check check("rope");
  check_rotated(check, "x", a.x, a.positions, a.inv_freq);
  const std::int64_t tokens = a.x.size(0), heads = a.x.size(1), d = a.x.size(2);
  check.tensor("y", a.y, "[tokens, heads, d]", {tokens, heads, d}, {a.x.dtype});
  check.unit_last_stride("y", a.y);
  check.on_device(a.x.device, {{"y", a.y}});
}

}  // namespace

void rope(const RopeArgs& args, const Launch& launch) {
  check_args(args);
  if (args.x.numel() == 0) return;
  forward(args, args.x.device, launch);
}

void rope_frequencies(const RopeFrequenciesArgs& args) {
  const Check check("rope_frequencies");
  check.contiguous("inv_freq", args.inv_freq, "[d_rope / 2]", {Check::kAny}, {DType::float32});
  check.on_device({DeviceType::cpu, 0}, {{"inv_freq", args.inv_freq}});
  // Written so that NaN is refused too.
  const auto require = [&](bool holds, const char* argument, const char* expected, double got) {
    check.that(holds && std::isfinite(got), argument, expected, std::to_string(got));
  };
  require(args.base > 1, "base", "a number greater than 1", args.base);
  require(args.factor >= 1, "factor", "a number of at least 1", args.factor);
  require(args.original_length > 0, "original_length", "a number greater than 0", args.original_length);
  require(args.beta_slow > 0, "beta_slow", "a number greater than 0", args.beta_slow);
  require(args.beta_fast >= args.beta_slow, "beta_fast", "a number of at least beta_slow", args.beta_fast);
  const int pairs = static_cast<int>(args.inv_freq.size(0));
  const RopeFrequencies frequency(2 * pairs, args.base,
                                  {args.factor, args.original_length, args.beta_fast, args.beta_slow});
  for (int i = 0; i < pairs; ++i) args.inv_freq.as<float>()[i] = frequency(i);
}

double yarn_softmax_scale(std::int64_t d_qk, double factor, double mscale) {
  const Check check("yarn_softmax_scale");
  check.that(d_qk > 0, "d_qk", "greater than 0", d_qk);
  check.that(factor >= 1 && std::isfinite(factor), "factor", "a number of at least 1", std::to_string(factor));
  check.that(std::isfinite(mscale), "mscale", "a number", std::to_string(mscale));
  const double m = yarn_mscale(factor, mscale);
  return std::pow(static_cast<double>(d_qk), -0.5) * m * m;
}

}  // namespace dsm
