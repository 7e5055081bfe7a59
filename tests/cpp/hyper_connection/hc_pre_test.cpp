// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "dsm/error.h"
#include "dsm/hyper_connection.h"

namespace dsm {
namespace {

// One token with four streams of a single 1, of which the projection reads the first: mixes[j] = sin(j + 1).
struct HcPre : testing::Test {
  static constexpr int kHc = 4, kOutputs = 24;
  std::vector<double> x = std::vector<double>(kHc, 1), fn = std::vector<double>(kOutputs * kHc), base, scale{0.5, 1, 2};
  std::vector<double> mixed{-1}, post = std::vector<double>(kHc, -1), comb = std::vector<double>(kHc * kHc, -1);
  std::vector<double> mixes = std::vector<double>(kOutputs, -1), rstd{-1};

  HcPre() {
    for (int j = 0; j < kOutputs; ++j) {
      fn[j * kHc] = std::sin(j + 1);
      base.push_back(0.1 * std::cos(j));
    }
  }

  HcPreArgs args() {
    constexpr DType kType = DType::float64;
    return {.x = {x.data(), kType, {1, kHc, 1}},
            .fn = {fn.data(), kType, {kOutputs, kHc}},
            .base = {base.data(), kType, {kOutputs}},
            .scale = {scale.data(), kType, {3}},
            .norm_eps = 0,
            .mixed = {mixed.data(), kType, {1, 1}},
            .post = {post.data(), kType, {1, kHc}},
            .comb = {comb.data(), kType, {1, kHc, kHc}},
            .mixes = {mixes.data(), kType, {1, kOutputs}},
            .rstd = {rstd.data(), kType, {1}}};
  }
};

TEST_F(HcPre, GoldenValues) {
  hc_pre(args());
  EXPECT_EQ(rstd[0], 1);
  EXPECT_NEAR(mixed[0], 0.6273207 + 0.6244977 + 0.5072368 + 0.3828671, 2e-7);
  const std::vector<double> golden_post{0.5283857, 0.8751305, 1.3596656, 1.4871939};
  const std::vector<double> golden_comb{0.4194917, 0.1966519, 0.1593736, 0.2244819, 0.0441642, 0.4764562,
                                        0.4472875, 0.0320910, 0.0038114, 0.0212904, 0.2837327, 0.6911646,
                                        0.5325318, 0.3056005, 0.1096052, 0.0522615};
  for (int j = 0; j < kHc; ++j) EXPECT_NEAR(post[j], golden_post[j], 1e-7) << j;
  for (int i = 0; i < kHc * kHc; ++i) EXPECT_NEAR(comb[i], golden_comb[i], 1e-7) << i;
}

TEST_F(HcPre, EqualLogitsMixEvenly) {
  fn.assign(fn.size(), 0);
  base.assign(base.size(), 0);
  HcPreArgs a = args();
  a.eps = 0;
  hc_pre(a);
  EXPECT_EQ(mixed[0], 4 * 0.5);
  EXPECT_EQ(post, std::vector<double>(kHc, 1));
  EXPECT_EQ(comb, std::vector<double>(kHc * kHc, 0.25));
}

TEST_F(HcPre, HeadIsItsFirstPart) {
  hc_pre(args());
  double head = -1;
  hc_head({.x = args().x,
           .fn = {fn.data(), DType::float64, {kHc, kHc}},
           .base = {base.data(), DType::float64, {kHc}},
           .scale = {scale.data(), DType::float64, {1}},
           .norm_eps = 0,
           .mixed = {&head, DType::float64, {1, 1}},
           .mixes = {mixes.data(), DType::float64, {1, kHc}},
           .rstd = {rstd.data(), DType::float64, {1}}});
  EXPECT_EQ(head, mixed[0]);
}

TEST_F(HcPre, WithoutTokensTheParametersHaveZeroGradients) {
  constexpr DType kType = DType::float64;
  std::vector<double> dfn(fn.size(), -1), dbase(kOutputs, -1), dscale(3, -1);
  hc_pre_backward({.dmixed = {nullptr, kType, {0, 1}},
                   .dpost = {nullptr, kType, {0, kHc}},
                   .dcomb = {nullptr, kType, {0, kHc, kHc}},
                   .x = {nullptr, kType, {0, kHc, 1}},
                   .fn = args().fn,
                   .base = args().base,
                   .scale = args().scale,
                   .mixes = {nullptr, kType, {0, kOutputs}},
                   .rstd = {nullptr, kType, {0}},
                   .dx = {nullptr, kType, {0, kHc, 1}},
                   .dfn = {dfn.data(), kType, {kOutputs, kHc}},
                   .dbase = {dbase.data(), kType, {kOutputs}},
                   .dscale = {dscale.data(), kType, {3}}});
  EXPECT_EQ(dfn, std::vector<double>(fn.size(), 0));
  EXPECT_EQ(dbase, std::vector<double>(kOutputs, 0));
  EXPECT_EQ(dscale, std::vector<double>(3, 0));
}

TEST_F(HcPre, RefusesBeforeWriting) {
  for (int iterations : {0, -1, 1001}) {
    HcPreArgs a = args();
    a.iterations = iterations;
    EXPECT_THROW(hc_pre(a), Error) << iterations;
  }
  HcPreArgs narrow = args();
  narrow.fn.dtype = DType::float32;
  EXPECT_THROW(hc_pre(narrow), Error);
  HcPreArgs short_scale = args();
  short_scale.scale = {scale.data(), DType::float64, {2}};
  EXPECT_THROW(hc_pre(short_scale), Error);
  EXPECT_EQ(mixed[0], -1);
  EXPECT_EQ(mixes[0], -1);
  EXPECT_EQ(comb[0], -1);
}

}  // namespace
}  // namespace dsm
