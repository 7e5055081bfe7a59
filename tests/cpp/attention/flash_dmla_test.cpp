// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "dsm/attention.h"
#include "dsm/error.h"

namespace dsm {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

TensorView view(const std::vector<float>& x, std::initializer_list<std::int64_t> shape) {
  return {x.data(), DType::float32, shape};
}

/// The square matrix with 1 on the diagonal.
std::vector<float> identity(std::int64_t n) {
  std::vector<float> w(n * n, 0.f);
  for (std::int64_t i = 0; i < n; ++i) w[i * n + i] = 1;
  return w;
}

TEST(FlashDmla, IdentityProjectionsAreSoftmaxAttention) {
  constexpr std::int64_t kHeads = 2, kQueries = 5, kKeys = 9, kD = 4;
  std::vector<float> q(kHeads * kQueries * kD), kv(kHeads * kKeys * kD), w = identity(kD);
  for (std::size_t i = 0; i < q.size(); ++i) q[i] = std::sin(static_cast<float>(i));
  for (std::size_t i = 0; i < kv.size(); ++i) kv[i] = std::cos(static_cast<float>(i));
  std::vector<float> out(q.size(), kNaN), latent(q.size(), kNaN), lse(kHeads * kQueries, kNaN);
  flash_dmla({.q = view(q, {1, kHeads, kQueries, kD}),
              .k = view(kv, {1, kHeads, kKeys, kD}),
              .v = view(kv, {1, kHeads, kKeys, kD}),
              .wk = view(w, {kD, kD}),
              .wv = view(w, {kD, kD}),
              .softmax_scale = 0.5,
              .causal = true,
              .out = view(out, {1, kHeads, kQueries, kD}),
              .latent = view(latent, {1, kHeads, kQueries, kD}),
              .lse = view(lse, {1, kHeads, kQueries})});
  EXPECT_EQ(out, latent);

  std::vector<float> expected(q.size(), kNaN), expected_lse(lse.size(), kNaN);
  // flash_attn puts rows before heads: one head at a time, as a batch.
  flash_attn({.q = view(q, {kHeads, kQueries, 1, kD}),
              .k = view(kv, {kHeads, kKeys, 1, kD}),
              .v = view(kv, {kHeads, kKeys, 1, kD}),
              .softmax_scale = 0.5,
              .causal = true,
              .out = view(expected, {kHeads, kQueries, 1, kD}),
              .lse = view(expected_lse, {kHeads, 1, kQueries})});
  EXPECT_EQ(out, expected);
  EXPECT_EQ(lse, expected_lse);
}

TEST(FlashDmla, ProjectsThroughARankOneSpace) {
  // d_latent = 1: with equal keys, the latent output is the mean of v · wv, and out spreads it along wv.
  const std::vector<float> q = {1, 1}, k = {1, 1, 1, 1, 1, 1}, v = {1, 0, 0, 2, 3, 3}, wk = {1, 1}, wv = {1, 2};
  std::vector<float> out(2, kNaN), latent(1, kNaN), lse(1, kNaN);
  flash_dmla({.q = view(q, {1, 1, 1, 2}),
              .k = view(k, {1, 1, 3, 2}),
              .v = view(v, {1, 1, 3, 2}),
              .wk = view(wk, {2, 1}),
              .wv = view(wv, {2, 1}),
              .softmax_scale = 1,
              .out = view(out, {1, 1, 1, 2}),
              .latent = view(latent, {1, 1, 1, 1}),
              .lse = view(lse, {1, 1, 1})});
  EXPECT_NEAR(latent[0], (1 + 4 + 9) / 3.0, 1e-6);
  EXPECT_NEAR(out[0], 14 / 3.0, 1e-6);
  EXPECT_NEAR(out[1], 28 / 3.0, 1e-5);
  EXPECT_NEAR(lse[0], 4 + std::log(3.0), 1e-6);
}

TEST(FlashDmlaBackward, WeightGradientsAddUpAllHeads) {
  // One key per head: p = 1, so out = v wv wvᵀ and the gradient of wv is dout latentᵀ + v dlatentᵀ, summed over heads.
  constexpr std::int64_t kHeads = 600;  // more than the partial sums that are kept
  const std::vector<float> ones(kHeads, 1.f), w = {3.f};
  std::vector<float> dq(kHeads), dk(kHeads), dv(kHeads), dwk(1), dwv(1);
  const std::vector<float> latent(kHeads, 3.f), lse(kHeads, 9.f);
  const auto rows = [](const std::vector<float>& x) { return view(x, {1, kHeads, 1, 1}); };
  flash_dmla_backward({.dout = rows(ones),
                       .q = rows(ones),
                       .k = rows(ones),
                       .v = rows(ones),
                       .wk = view(w, {1, 1}),
                       .wv = view(w, {1, 1}),
                       .latent = rows(latent),
                       .lse = view(lse, {1, kHeads, 1}),
                       .dq = rows(dq),
                       .dk = rows(dk),
                       .dv = rows(dv),
                       .dwk = view(dwk, {1, 1}),
                       .dwv = view(dwv, {1, 1})});
  EXPECT_EQ(dwv[0], kHeads * (3.f + 3.f));
  EXPECT_EQ(dwk[0], 0.f);
  for (float x : dv) EXPECT_EQ(x, 9.f);
  for (float x : dq) EXPECT_EQ(x, 0.f);
}

TEST(FlashDmlaBackward, EmptyBatchGivesZeroWeightGradients) {
  const std::vector<float> none, w(6, 1.f);
  std::vector<float> dwk(6, kNaN), dwv(6, kNaN);
  flash_dmla_backward({.dout = view(none, {0, 1, 4, 3}),
                       .q = view(none, {0, 1, 4, 3}),
                       .k = view(none, {0, 1, 4, 3}),
                       .v = view(none, {0, 1, 4, 3}),
                       .wk = view(w, {3, 2}),
                       .wv = view(w, {3, 2}),
                       .latent = view(none, {0, 1, 4, 2}),
                       .lse = view(none, {0, 1, 4}),
                       .dq = view(none, {0, 1, 4, 3}),
                       .dk = view(none, {0, 1, 4, 3}),
                       .dv = view(none, {0, 1, 4, 3}),
                       .dwk = view(dwk, {3, 2}),
                       .dwv = view(dwv, {3, 2})});
  for (float x : dwk) EXPECT_EQ(x, 0.f);
  for (float x : dwv) EXPECT_EQ(x, 0.f);
}

TEST(FlashDmla, RefusesBeforeWriting) {
  const std::vector<float> x(24, 1.f), w(6, 1.f);
  std::vector<float> out(24, 7.f), latent(16, 7.f), lse(8, 7.f);
  FlashDmlaArgs args{.q = view(x, {2, 1, 4, 3}),
                     .k = view(x, {2, 1, 3, 3}),
                     .v = view(x, {2, 1, 3, 3}),
                     .wk = view(w, {3, 2}),
                     .wv = view(w, {3, 2}),
                     .causal = true,
                     .out = view(out, {2, 1, 4, 3}),
                     .latent = view(latent, {2, 1, 4, 2}),
                     .lse = view(lse, {2, 1, 4})};
  try {
    flash_dmla(args);
    FAIL() << "more queries than keys were taken in a causal call";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "flash_dmla: s_q must be at most s_kv = 3 when causal, got 4");
  }
  args.causal = false;
  args.wk = {};
  EXPECT_THROW(flash_dmla(args), Error);
  args.cache_is_latent = true;
  EXPECT_NO_THROW(flash_dmla({.q = view(w, {1, 1, 3, 2}),
                              .k = view(w, {1, 1, 3, 2}),
                              .v = view(w, {1, 1, 3, 2}),
                              .cache_is_latent = true,
                              .latent = view(latent, {1, 1, 3, 2}),
                              .lse = view(lse, {1, 1, 3})}));
  std::fill(latent.begin(), latent.end(), 7.f);
  std::fill(lse.begin(), lse.end(), 7.f);
  EXPECT_THROW(flash_dmla(args), Error);  // the keys are not as wide as the latent queries
  for (const auto* written : {&out, &latent, &lse})
    for (float value : *written) EXPECT_EQ(value, 7.f);
}

}  // namespace
}  // namespace dsm
