// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "dsm/error.h"
#include "dsm/moe.h"
#include "src/cpu/kernels.h"

// The experts, fused and operator by operator, against loops in double.
namespace dsm {
namespace {

using Index = std::int64_t;

double silu(double v) { return v / (1 + std::exp(-v)); }

std::vector<float> random(Index count, std::mt19937& engine, double scale = 1) {
  std::normal_distribution<float> normal(0, static_cast<float>(scale));
  std::vector<float> values(count);
  for (float& v : values) v = normal(engine);
  return values;
}

struct Layer {
  Index tokens, topk, experts, hidden, intermediate;
  std::mt19937 engine{7};
  std::vector<float> x = random(tokens * hidden, engine), weights = random(tokens * topk, engine);
  std::vector<float> w13 = random(experts * 2 * intermediate * hidden, engine, 0.3);
  std::vector<float> w2 = random(experts * hidden * intermediate, engine, 0.3);
  std::vector<std::int32_t> indices = std::vector<std::int32_t>(tokens * topk);

  /// Pair i goes to expert `first + i * step`, modulo `experts + 1`, the last of which stands for dropped.
  void route(Index first, Index step) {
    for (Index i = 0; i < tokens * topk; ++i) {
      const Index e = (first + i * step) % (experts + 1);
      indices[i] = static_cast<std::int32_t>(e == experts ? -1 : e);
    }
  }

  MoeFfnArgs args(std::vector<float>& y, std::vector<float>& z) const {
    return {.x = {x.data(), DType::float32, {tokens, hidden}},
            .weights = {weights.data(), DType::float32, {tokens, topk}},
            .indices = {indices.data(), DType::int32, {tokens, topk}},
            .w13 = {w13.data(), DType::float32, {experts, 2 * intermediate, hidden}},
            .w2 = {w2.data(), DType::float32, {experts, hidden, intermediate}},
            .y = {y.data(), DType::float32, {tokens, hidden}},
            .z = {z.data(), DType::float32, {tokens * topk, 2 * intermediate}}};
  }

  std::vector<double> truth() const {
    std::vector<double> y(tokens * hidden);
    for (Index pair = 0; pair < tokens * topk; ++pair) {
      const Index e = indices[pair], t = pair / topk;
      if (e < 0) continue;
      const auto product = [&](Index row) {
        double sum = 0;
        for (Index h = 0; h < hidden; ++h)
          sum += double(w13[(e * 2 * intermediate + row) * hidden + h]) * x[t * hidden + h];
        return sum;
      };
      for (Index i = 0; i < intermediate; ++i) {
        const double act = silu(product(i)) * product(intermediate + i);
        for (Index h = 0; h < hidden; ++h)
          y[t * hidden + h] += double(weights[pair]) * act * w2[(e * hidden + h) * intermediate + i];
      }
    }
    return y;
  }

  /// The same by moe_permute, grouped_gemm, swiglu, grouped_gemm and moe_combine.
  std::vector<float> unfused() const {
    const Index pairs = tokens * topk;
    std::vector<std::int32_t> offsets(experts + 1), row_of_slot(pairs), slot_of_row(pairs);
    std::vector<float> rows(pairs * hidden), z(pairs * 2 * intermediate), act(pairs * intermediate), y(tokens * hidden);
    const TensorView view_of_offsets(offsets.data(), DType::int32, {experts + 1});
    const TensorView view_of_rows(rows.data(), DType::float32, {pairs, hidden});
    const TensorView view_of_z(z.data(), DType::float32, {pairs, 2 * intermediate});
    const TensorView view_of_act(act.data(), DType::float32, {pairs, intermediate});
    const TensorView slots(row_of_slot.data(), DType::int32, {tokens, topk});
    std::vector<float> none_y, none_z;
    const MoeFfnArgs a = args(none_y, none_z);
    moe_permute({.x = a.x,
                 .indices = a.indices,
                 .rows = view_of_rows,
                 .expert_offsets = view_of_offsets,
                 .row_of_slot = slots,
                 .slot_of_row = {slot_of_row.data(), DType::int32, {pairs}}});
    grouped_gemm({.a = view_of_rows, .b = a.w13, .expert_offsets = view_of_offsets, .c = view_of_z});
    swiglu({.z = view_of_z, .y = view_of_act});
    grouped_gemm({.a = view_of_act, .b = a.w2, .expert_offsets = view_of_offsets, .c = view_of_rows});
    moe_combine({.rows = view_of_rows,
                 .row_of_slot = slots,
                 .weights = a.weights,
                 .y = {y.data(), DType::float32, {tokens, hidden}}});
    return y;
  }
};

TEST(MoeFfn, OneExpertOneNeuron) {
  const std::vector<double> x{3}, weights{0.5}, w13{1, 2}, w2{4};
  const std::vector<std::int32_t> indices{0};
  std::vector<double> y(1), z(2);
  moe_ffn({.x = {x.data(), DType::float64, {1, 1}},
           .weights = {weights.data(), DType::float64, {1, 1}},
           .indices = {indices.data(), DType::int32, {1, 1}},
           .w13 = {w13.data(), DType::float64, {1, 2, 1}},
           .w2 = {w2.data(), DType::float64, {1, 1, 1}},
           .shared_w13 = {w13.data(), DType::float64, {2, 1}},
           .shared_w2 = {w2.data(), DType::float64, {1, 1}},
           .y = {y.data(), DType::float64, {1, 1}}});
  EXPECT_NEAR(y[0], 1.5 * 4 * silu(3) * 6, 1e-13);  // routed with weight 0.5, shared with weight 1
}

class MoeFfnOnEveryIsa : public testing::TestWithParam<cpu::Isa> {
 protected:
  void SetUp() override {
    if (!cpu::supported(GetParam())) GTEST_SKIP() << "this processor has no such instructions";
    cpu::set_isa_for_test(GetParam());
  }
  void TearDown() override {
    for (const cpu::Isa isa : {cpu::Isa::baseline, cpu::Isa::avx2, cpu::Isa::avx512})
      if (cpu::supported(isa)) cpu::set_isa_for_test(isa);
  }
};

TEST_P(MoeFfnOnEveryIsa, MatchesLoopsInDoubleAndTheUnfusedBits) {
  double worst = 0;
  for (const auto& [tokens, topk, experts, hidden, intermediate] : std::initializer_list<std::array<Index, 5>>{
           {1, 1, 1, 1, 1}, {2, 3, 40, 17, 9}, {250, 2, 3, 31, 300}, {700, 4, 5, 140, 6}}) {
    Layer layer{tokens, topk, experts, hidden, intermediate};
    layer.route(0, 7);
    // Poison: every element of the results must be written.
    std::vector<float> y(tokens * hidden, NAN), z(tokens * topk * 2 * intermediate, NAN);
    moe_ffn(layer.args(y, z));
    const std::vector<double> truth = layer.truth();
    double scale = 0, error = 0;
    for (const double v : truth) scale = std::max(scale, std::abs(v));
    for (std::size_t i = 0; i < y.size(); ++i) error = std::max(error, std::abs(y[i] - truth[i]));
    worst = std::max(worst, error / scale);
    for (const float v : z) ASSERT_FALSE(std::isnan(v));
    EXPECT_EQ(y, layer.unfused());
  }
  std::printf("worst error %.2e of the largest result\n", worst);
  EXPECT_LT(worst, 3e-6);
}

INSTANTIATE_TEST_SUITE_P(Isa, MoeFfnOnEveryIsa, testing::Values(cpu::Isa::baseline, cpu::Isa::avx2, cpu::Isa::avx512));

TEST(MoeFfn, BackwardIsTheSlopeOfTheForward) {
  // Along a random direction through all inputs at once, in double: central differences.
  constexpr Index tokens = 6, topk = 2, experts = 3, hidden = 5, intermediate = 4, shared = 3;
  std::mt19937 engine(3);
  const auto draw = [&](Index n) {
    const std::vector<float> values = random(n, engine, 0.5);
    return std::vector<double>(values.begin(), values.end());
  };
  const std::vector<Index> sizes{
      tokens * hidden,     tokens * topk,  experts * 2 * intermediate * hidden, experts * hidden * intermediate,
      2 * shared * hidden, hidden * shared};
  std::vector<std::vector<double>> inputs, direction, gradient;
  for (const Index size : sizes) {
    inputs.push_back(draw(size));
    direction.push_back(draw(size));
    gradient.emplace_back(size, NAN);
  }
  const std::vector<double> dy = draw(tokens * hidden);
  const std::vector<std::int32_t> indices{0, 2, 2, 0, -1, 2, 0, -3, 2, 2, -1, -1};  // expert 1 gets nothing
  std::vector<double> y(tokens * hidden), z(tokens * topk * 2 * intermediate), shared_z(tokens * 2 * shared);
  const auto views = [&](const std::vector<std::vector<double>>& tensors) {
    return std::array<TensorView, 6>{TensorView(tensors[0].data(), DType::float64, {tokens, hidden}),
                                     TensorView(tensors[1].data(), DType::float64, {tokens, topk}),
                                     TensorView(tensors[2].data(), DType::float64, {experts, 2 * intermediate, hidden}),
                                     TensorView(tensors[3].data(), DType::float64, {experts, hidden, intermediate}),
                                     TensorView(tensors[4].data(), DType::float64, {2 * shared, hidden}),
                                     TensorView(tensors[5].data(), DType::float64, {hidden, shared})};
  };
  const TensorView view_of_indices(indices.data(), DType::int32, {tokens, topk});
  const TensorView view_of_z(z.data(), DType::float64, {tokens * topk, 2 * intermediate});
  const TensorView view_of_shared_z(shared_z.data(), DType::float64, {tokens, 2 * shared});
  constexpr double limit = 0.4;
  const auto value = [&](double step) {
    std::vector<std::vector<double>> moved = inputs;
    for (std::size_t i = 0; i < moved.size(); ++i)
      for (std::size_t j = 0; j < moved[i].size(); ++j) moved[i][j] += step * direction[i][j];
    const auto v = views(moved);
    moe_ffn({.x = v[0],
             .weights = v[1],
             .indices = view_of_indices,
             .w13 = v[2],
             .w2 = v[3],
             .shared_w13 = v[4],
             .shared_w2 = v[5],
             .swiglu_limit = limit,
             .y = {y.data(), DType::float64, {tokens, hidden}},
             .z = view_of_z,
             .shared_z = view_of_shared_z});
    double sum = 0;
    for (std::size_t i = 0; i < y.size(); ++i) sum += y[i] * dy[i];
    return sum;
  };
  const double slope = (value(1e-6) - value(-1e-6)) / 2e-6;
  value(0);
  const auto v = views(inputs), d = views(gradient);
  moe_ffn_backward({.dy = {dy.data(), DType::float64, {tokens, hidden}},
                    .x = v[0],
                    .weights = v[1],
                    .indices = view_of_indices,
                    .w13 = v[2],
                    .w2 = v[3],
                    .shared_w13 = v[4],
                    .shared_w2 = v[5],
                    .swiglu_limit = limit,
                    .z = view_of_z,
                    .shared_z = view_of_shared_z,
                    .dx = d[0],
                    .dweights = d[1],
                    .dw13 = d[2],
                    .dw2 = d[3],
                    .dshared_w13 = d[4],
                    .dshared_w2 = d[5]});
  double predicted = 0;
  for (std::size_t i = 0; i < gradient.size(); ++i)
    for (std::size_t j = 0; j < gradient[i].size(); ++j) predicted += gradient[i][j] * direction[i][j];
  EXPECT_NEAR(predicted, slope, 1e-7 * std::abs(slope));
  for (Index i = 0; i < 2 * intermediate * hidden; ++i) EXPECT_EQ(gradient[2][2 * intermediate * hidden + i], 0);
}

TEST(MoeFfn, WithoutPairsTheResultIsZero) {
  Layer layer{3, 2, 2, 4, 5};
  layer.indices.assign(6, -1);
  std::vector<float> y(12, NAN), z(60, NAN);
  moe_ffn(layer.args(y, z));
  EXPECT_EQ(y, std::vector<float>(12));
  EXPECT_EQ(z, std::vector<float>(60));
}

TEST(MoeFfn, RefusesBeforeWriting) {
  Layer layer{3, 2, 2, 4, 5};
  std::vector<float> y(12, 7), z(60, 7);
  layer.indices[5] = 2;
  EXPECT_THROW(moe_ffn(layer.args(y, z)), Error);
  layer.indices[5] = 1;
  MoeFfnArgs a = layer.args(y, z);
  a.swiglu_limit = 0;
  EXPECT_THROW(moe_ffn(a), Error);
  a = layer.args(y, z);
  a.shared_w13 = {layer.w13.data(), DType::float32, {2, 4}};
  EXPECT_THROW(moe_ffn(a), Error);
  EXPECT_EQ(y, std::vector<float>(12, 7));
  EXPECT_EQ(z, std::vector<float>(60, 7));
}

TEST(GroupedGemm, RowsBehindTheLastExpertBecomeZero) {
  const std::vector<float> a{1, 2, 3, NAN}, b{10, 20};
  const std::vector<std::int32_t> offsets{0, 1, 3};
  std::vector<float> c(4, NAN);
  GroupedGemmArgs args{.a = {a.data(), DType::float32, {4, 1}},
                       .b = {b.data(), DType::float32, {2, 1, 1}},
                       .expert_offsets = {offsets.data(), DType::int32, {3}},
                       .c = {c.data(), DType::float32, {4, 1}}};
  grouped_gemm(args);
  EXPECT_EQ(c, (std::vector<float>{10, 40, 60, 0}));
  const std::vector<std::int32_t> backwards{0, 3, 1};
  args.expert_offsets.data = const_cast<std::int32_t*>(backwards.data());
  EXPECT_THROW(grouped_gemm(args), Error);
}

TEST(Swiglu, LimitsAndTheirGradients) {
  const std::vector<double> z{1, 5, -5, 1, 9, 0.5}, dy{1, 1, 1};  // gates 1, 5, -5; ups 1, 9, 0.5
  std::vector<double> y(3), dz(6);
  const TensorView view_of_z(z.data(), DType::float64, {1, 6});
  swiglu({.z = view_of_z, .limit = 2, .y = {y.data(), DType::float64, {1, 3}}});
  EXPECT_NEAR(y[0], silu(1), 1e-15);
  EXPECT_NEAR(y[1], silu(2) * 2, 1e-15);
  EXPECT_NEAR(y[2], silu(-5) * 0.5, 1e-15);
  swiglu_backward({.dy = {dy.data(), DType::float64, {1, 3}},
                   .z = view_of_z,
                   .limit = 2,
                   .dz = {dz.data(), DType::float64, {1, 6}}});
  const auto slope = [](double v) { return (silu(v + 1e-6) - silu(v - 1e-6)) / 2e-6; };
  const std::vector<double> expected{slope(1), 0, 0.5 * slope(-5), silu(1), 0, silu(-5)};
  for (int i = 0; i < 6; ++i) EXPECT_NEAR(dz[i], expected[i], 1e-9) << i;
}

}  // namespace
}  // namespace dsm
