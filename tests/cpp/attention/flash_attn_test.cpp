// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "dsm/attention.h"
#include "dsm/error.h"

namespace dsm {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

/// v[j, c] = j + c: the mean over the first n keys is (n − 1) / 2 + c.
std::vector<float> ramp(std::int64_t rows, std::int64_t d) {
  std::vector<float> v(rows * d);
  for (std::int64_t i = 0; i < rows * d; ++i) v[i] = static_cast<float>(i / d + i % d);
  return v;
}

TEST(FlashAttn, UniformScoresGiveTheMeanOfTheVisibleValues) {
  constexpr std::int64_t kQueries = 131, kKeys = 300, kD = 5;
  const std::vector<float> q(kQueries * 8, 0.f), k(kKeys * 8, 3.f), v = ramp(kKeys, kD);
  std::vector<float> out(kQueries * kD, kNaN), lse(kQueries, kNaN);
  for (bool causal : {false, true}) {
    flash_attn({.q = {q.data(), DType::float32, {1, kQueries, 1, 8}},
                .k = {k.data(), DType::float32, {1, kKeys, 1, 8}},
                .v = {v.data(), DType::float32, {1, kKeys, 1, kD}},
                .causal = causal,
                .out = {out.data(), DType::float32, {1, kQueries, 1, kD}},
                .lse = {lse.data(), DType::float32, {1, 1, kQueries}}});
    for (std::int64_t i = 0; i < kQueries; ++i) {
      const std::int64_t n = causal ? i + 1 + kKeys - kQueries : kKeys;
      EXPECT_NEAR(lse[i], std::log(static_cast<double>(n)), 1e-6);
      for (std::int64_t c = 0; c < kD; ++c)
        EXPECT_NEAR(out[i * kD + c], static_cast<double>(n - 1) / 2 + static_cast<double>(c), 2e-4);
    }
  }
}

TEST(FlashAttn, OneKeyReturnsItsValue) {
  const float q[] = {1, 2}, k[] = {3, 4}, v[] = {5, 6, 7};
  float out[3], lse[1];
  flash_attn({.q = {q, DType::float32, {1, 1, 1, 2}},
              .k = {k, DType::float32, {1, 1, 1, 2}},
              .v = {v, DType::float32, {1, 1, 1, 3}},
              .softmax_scale = 0.5,
              .out = {out, DType::float32, {1, 1, 1, 3}},
              .lse = {lse, DType::float32, {1, 1, 1}}});
  for (int c = 0; c < 3; ++c) EXPECT_EQ(out[c], v[c]);
  EXPECT_EQ(lse[0], 5.5f);
}

TEST(FlashAttn, GroupsOfQueryHeadsShareAKeyHead) {
  // Key head g holds the value g everywhere, so query head h must return h / 2.
  constexpr std::int64_t kHeads = 6, kKeyHeads = 3;
  for (std::int64_t queries : {1, 4}) {
    const std::vector<float> q(queries * kHeads, 1.f), k(7 * kKeyHeads, 1.f);
    std::vector<float> v(7 * kKeyHeads), out(queries * kHeads, kNaN), lse(queries * kHeads, kNaN);
    for (std::size_t i = 0; i < v.size(); ++i) v[i] = static_cast<float>(i % kKeyHeads);
    flash_attn({.q = {q.data(), DType::float32, {1, queries, kHeads, 1}},
                .k = {k.data(), DType::float32, {1, 7, kKeyHeads, 1}},
                .v = {v.data(), DType::float32, {1, 7, kKeyHeads, 1}},
                .causal = true,
                .out = {out.data(), DType::float32, {1, queries, kHeads, 1}},
                .lse = {lse.data(), DType::float32, {1, kHeads, queries}}});
    for (std::int64_t i = 0; i < queries * kHeads; ++i) EXPECT_FLOAT_EQ(out[i], static_cast<float>(i % kHeads / 2));
    for (std::int64_t i = 0; i < queries * kHeads; ++i)
      EXPECT_NEAR(lse[i], 1 + std::log(8.0 - static_cast<double>(queries - i % queries)), 1e-6);
  }
}

TEST(FlashAttn, OneKeyHeadServesMoreQueryHeadsThanATileHasScores) {
  constexpr std::int64_t kHeads = 40000;
  const std::vector<float> q(kHeads, 1.f), k = {0, 0, 0}, v = {1, 2, 6};
  std::vector<float> out(kHeads, kNaN), lse(kHeads, kNaN);
  flash_attn({.q = {q.data(), DType::float32, {1, 1, kHeads, 1}},
              .k = {k.data(), DType::float32, {1, 3, 1, 1}},
              .v = {v.data(), DType::float32, {1, 3, 1, 1}},
              .out = {out.data(), DType::float32, {1, 1, kHeads, 1}},
              .lse = {lse.data(), DType::float32, {1, kHeads, 1}}});
  for (float x : out) ASSERT_FLOAT_EQ(x, 3.f);
}

TEST(FlashAttn, VarlenReadsOnlyItsSequences) {
  // Rows: two outside, sequences of 1 and 2 keys with 1 and 3 queries, one row outside.
  std::vector<float> q(7, 1.f), k = {kNaN, kNaN, 0, 0, 0, kNaN}, v = {kNaN, kNaN, 10, 20, 30, kNaN};
  const std::int32_t cu_q[] = {2, 3, 6}, cu_kv[] = {2, 3, 5};
  std::vector<float> out(7, kNaN), lse(7, kNaN);
  flash_attn({.q = {q.data(), DType::float32, {7, 1, 1}},
              .k = {k.data(), DType::float32, {6, 1, 1}},
              .v = {v.data(), DType::float32, {6, 1, 1}},
              .cu_seqlens_q = {cu_q, DType::int32, {3}},
              .cu_seqlens_kv = {cu_kv, DType::int32, {3}},
              .causal = true,
              .out = {out.data(), DType::float32, {7, 1, 1}},
              .lse = {lse.data(), DType::float32, {1, 7}}});
  EXPECT_EQ(out, (std::vector<float>{0, 0, 10, 0, 20, 25, 0}));
  const float log2 = std::log(2.f);
  EXPECT_EQ(lse, (std::vector<float>{-kInfinity, -kInfinity, 0, -kInfinity, 0, log2, -kInfinity}));
}

TEST(FlashAttnBackward, UniformScores) {
  // With q = 0: p = 1/n, dv_j = Σ_i dout_i / n, and dk = 0; the gradient of q is the covariance of k and v.
  constexpr std::int64_t kQueries = 3, kKeys = 4;
  const std::vector<double> q(kQueries, 0), k = {0, 1, 2, 3}, v = {1, 1, 5, 5}, dout(kQueries, 2), out(kQueries, 3);
  const std::vector<double> lse(kQueries, std::log(4.0));
  std::vector<double> dq(kQueries), dk(kKeys), dv(kKeys);
  const auto rows = [](const std::vector<double>& x) {
    return TensorView(x.data(), DType::float64, {1, static_cast<std::int64_t>(x.size()), 1, 1});
  };
  flash_attn_backward({.dout = rows(dout),
                       .q = rows(q),
                       .k = rows(k),
                       .v = rows(v),
                       .out = rows(out),
                       .lse = {lse.data(), DType::float64, {1, 1, kQueries}},
                       .softmax_scale = 0.5,
                       .dq = rows(dq),
                       .dk = rows(dk),
                       .dv = rows(dv)});
  for (double x : dv) EXPECT_NEAR(x, 1.5, 1e-15);
  for (double x : dk) EXPECT_NEAR(x, 0, 1e-15);
  // Σ_j p dout (v_j − mean) k_j · scale = ¼ · 2 · (−2·0 − 2·1 + 2·2 + 2·3) · ½
  for (double x : dq) EXPECT_NEAR(x, 2, 1e-15);
}

/// One head by plain loops in double: out, lse, and the gradients for dout = 1 and dlse = 0.
struct Plain {
  std::vector<double> out, lse, dq, dk, dv;

  Plain(const std::vector<float>& q, const std::vector<float>& k, const std::vector<float>& v, std::int64_t s_q,
        std::int64_t s_kv, std::int64_t d, bool causal)
      : out(s_q * d), lse(s_q), dq(s_q * d), dk(s_kv * d), dv(s_kv * d) {
    for (std::int64_t i = 0; i < s_q; ++i) {
      std::vector<double> p;
      for (std::int64_t j = 0; j < (causal ? std::max<std::int64_t>(i + 1 + s_kv - s_q, 0) : s_kv); ++j) {
        double s = 0;
        for (std::int64_t c = 0; c < d; ++c) s += static_cast<double>(q[i * d + c]) * k[j * d + c];
        p.push_back(std::exp(s));
      }
      const double sum = std::accumulate(p.begin(), p.end(), 0.0);
      lse[i] = std::log(sum);
      double delta = 0;
      for (std::size_t j = 0; j < p.size(); ++j) p[j] /= sum;
      for (std::size_t j = 0; j < p.size(); ++j)
        for (std::int64_t c = 0; c < d; ++c) out[i * d + c] += p[j] * v[j * d + c];
      for (std::int64_t c = 0; c < d; ++c) delta += out[i * d + c];
      for (std::size_t j = 0; j < p.size(); ++j) {
        double ds = -delta;
        for (std::int64_t c = 0; c < d; ++c) ds += v[j * d + c];
        ds *= p[j];
        for (std::int64_t c = 0; c < d; ++c) {
          dq[i * d + c] += ds * k[j * d + c];
          dk[j * d + c] += ds * q[i * d + c];
          dv[j * d + c] += p[j];
        }
      }
    }
  }
};

/// `scale` is the size of the terms where sums of them cancel.
void expect_near(const std::vector<float>& result, const std::vector<double>& truth, double scale = 0) {
  double worst = 0;
  for (double x : truth) scale = std::isfinite(x) ? std::max(scale, std::abs(x)) : scale;
  for (std::size_t i = 0; i < truth.size(); ++i)
    if (result[i] != truth[i]) worst = std::max(worst, std::abs(result[i] - truth[i]) / scale);
  EXPECT_LE(worst, 1e-5);
}

TEST(FlashAttn, AgreesWithPlainLoops) {
  struct Case {
    std::int64_t s_q, s_kv, d;
  };
  for (const auto& [s_q, s_kv, d] : {Case{1, 1, 1}, {65, 63, 3}, {64, 129, 16}, {70, 300, 17}, {2, 16400, 5}}) {
    for (bool causal : {false, true}) {
      const auto draw = [](std::int64_t n, float step) {
        std::vector<float> x(n);
        for (std::int64_t i = 0; i < n; ++i) x[i] = std::sin(step * static_cast<float>(i));
        return x;
      };
      const std::vector<float> q = draw(s_q * d, 0.7f), k = draw(s_kv * d, 1.3f), v = draw(s_kv * d, 0.3f);
      const std::vector<float> dout(s_q * d, 1.f);
      std::vector<float> out(s_q * d, kNaN), lse(s_q, kNaN), dq(s_q * d, kNaN), dk(s_kv * d, kNaN), dv(s_kv * d, kNaN);
      const auto rows = [d = d](const std::vector<float>& x) {
        return TensorView(x.data(), DType::float32, {1, static_cast<std::int64_t>(x.size()) / d, 1, d});
      };
      const TensorView statistics(lse.data(), DType::float32, {1, 1, s_q});
      flash_attn({.q = rows(q), .k = rows(k), .v = rows(v), .causal = causal, .out = rows(out), .lse = statistics});
      flash_attn_backward({.dout = rows(dout),
                           .q = rows(q),
                           .k = rows(k),
                           .v = rows(v),
                           .out = rows(out),
                           .lse = statistics,
                           .causal = causal,
                           .dq = rows(dq),
                           .dk = rows(dk),
                           .dv = rows(dv)});
      const Plain plain(q, k, v, s_q, s_kv, d, causal);
      SCOPED_TRACE(testing::Message() << s_q << " queries, " << s_kv << " keys, d " << d << ", causal " << causal);
      expect_near(lse, plain.lse);
      expect_near(out, plain.out, 1);
      expect_near(dq, plain.dq, 1);
      expect_near(dk, plain.dk);
      expect_near(dv, plain.dv);
    }
  }
}

TEST(FlashAttn, RefusesBeforeWriting) {
  std::vector<float> data(64, 1.f), out(64, 7.f), lse(64, 7.f);
  FlashAttnArgs args{.q = {data.data(), DType::float32, {1, 2, 3, 4}},
                     .k = {data.data(), DType::float32, {1, 2, 2, 4}},
                     .v = {data.data(), DType::float32, {1, 2, 2, 4}},
                     .out = {out.data(), DType::float32, {1, 2, 3, 4}},
                     .lse = {lse.data(), DType::float32, {1, 3, 2}}};
  try {
    flash_attn(args);
    FAIL() << "3 query heads over 2 key heads were taken";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "flash_attn: h_q must be a multiple of h_kv = 2, got 3");
  }
  args.k = args.v = {data.data(), DType::float32, {1, 2, 3, 4}};
  args.q.stride[3] = 2;
  EXPECT_THROW(flash_attn(args), Error);
  args.q.stride[3] = 1;
  args.out.stride[1] = 16;
  EXPECT_THROW(flash_attn(args), Error);
  args.out.stride[1] = 12;
  args.k.device = {DeviceType::cuda, 0};
  EXPECT_THROW(flash_attn(args), Error);
  for (float x : out) EXPECT_EQ(x, 7.f);
  for (float x : lse) EXPECT_EQ(x, 7.f);
}

}  // namespace
}  // namespace dsm
