// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/cpu/gemm.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "dsm/parallel.h"
#include "src/numerics/bf16.h"
#include "src/numerics/fp16.h"
#include "tests/cpp/cpu/each_isa.h"

namespace dsm::cpu {
namespace {

using Index = std::int64_t;

constexpr DType kFloatingTypes[] = {DType::float64, DType::float32, DType::float16, DType::bfloat16};
enum class Layout { rows, columns, both_strided, gathered };
constexpr Layout kLayouts[] = {Layout::rows, Layout::columns, Layout::both_strided, Layout::gathered};

std::mt19937_64 random_bits(1);

Index pick(std::initializer_list<Index> values) { return values.begin()[random_bits() % values.size()]; }

/// A matrix of doubles, and the same values in a storage type and layout, NaN filling whatever lies between them.
struct TestMatrix {
  Index rows, cols;
  std::vector<double> values;  // row-major
  std::vector<char> storage;   // ends with the last element, for AddressSanitizer
  std::vector<std::int32_t> chosen;
  Matrix view{};

  TestMatrix(Index rows, Index cols, std::vector<double> values, DType dtype, Layout layout)
      : rows(rows), cols(cols), values(std::move(values)) {
    Index row_stride = cols + 3, col_stride = 1, stored_rows = rows;
    if (layout == Layout::columns) row_stride = 1, col_stride = rows + 2;
    if (layout == Layout::both_strided) row_stride = 3 * cols + 1, col_stride = 3;
    chosen.resize(rows);
    for (Index i = 0; i < rows; ++i) chosen[i] = static_cast<std::int32_t>(i);
    if (layout == Layout::gathered) {
      stored_rows = rows + 2;
      for (auto& row : chosen) row = static_cast<std::int32_t>(random_bits() % stored_rows);
      for (Index i = 0; i < rows; ++i)  // rows chosen twice hold one set of values
        for (Index first = 0; first < i; ++first)
          if (chosen[first] == chosen[i]) std::copy_n(&this->values[first * cols], cols, &this->values[i * cols]);
    }
    const Index last = (stored_rows - 1) * row_stride + (cols - 1) * col_stride;
    storage.resize((last + 1) * element_size(dtype));
    for (Index e = 0; e <= last; ++e) put(dtype, e, std::numeric_limits<double>::quiet_NaN());
    for (Index i = 0; i < rows; ++i)
      for (Index j = 0; j < cols; ++j) put(dtype, chosen[i] * row_stride + j * col_stride, this->values[i * cols + j]);
    view = {storage.data(), dtype, row_stride, col_stride, layout == Layout::gathered ? chosen.data() : nullptr};
  }

  void put(DType dtype, Index element, double value) {
    char* target = storage.data() + element * element_size(dtype);
    const float f = static_cast<float>(value);
    const bfloat16 b = to_bfloat16(value);
    const float16 h = to_float16(value);
    const void* source = dtype == DType::float64   ? static_cast<const void*>(&value)
                         : dtype == DType::float32 ? static_cast<const void*>(&f)
                         : dtype == DType::float16 ? static_cast<const void*>(&h)
                                                   : static_cast<const void*>(&b);
    std::memcpy(target, source, element_size(dtype));
  }
};

/// Multiples of 1/8 up to 1, so that every storage type and every sum of fewer than 2^17 products is exact.
std::vector<double> exact_values(Index n) {
  std::vector<double> values(n);
  for (double& v : values) v = (static_cast<double>(random_bits() % 17) - 8) / 8;
  return values;
}

std::vector<double> normal_values(Index n, bool as_float) {
  std::normal_distribution<double> normal;
  std::vector<double> values(n);
  for (double& v : values) v = as_float ? static_cast<float>(normal(random_bits)) : normal(random_bits);
  return values;
}

using GemmTest = EachIsa;

template <class Acc>
void expect_exact(DType a_type, Layout a_layout, DType b_type, Layout b_layout, bool parallel) {
  const Index m = pick({1, 2, 3, 4, 5, 6, 7, 13, 64, 95, 97, 200});
  const Index n = pick({1, 3, 4, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 130, 300, 1030});
  const Index k = m * n > 50000 ? 9 : pick({1, 2, 7, 8, 9, 16, 31, 65, 255, 256, 257, 520});
  const Acc alpha = static_cast<Acc>(pick({-2, 1, 4})), beta = static_cast<Acc>(pick({0, 1}));
  const TestMatrix a(m, k, exact_values(m * k), a_type, a_layout), b(k, n, exact_values(k * n), b_type, b_layout);
  const Index ldc = n + pick({0, 5});
  const Acc untouched = 77;
  std::vector<Acc> c(m * ldc, untouched), expected;
  for (Index i = 0; i < m; ++i)
    for (Index j = 0; j < n; ++j) c[i * ldc + j] = beta == 0 ? std::numeric_limits<Acc>::quiet_NaN() : Acc(i - j);
  expected = c;
  for (Index i = 0; i < m; ++i)
    for (Index j = 0; j < n; ++j) {
      double sum = 0;
      for (Index q = 0; q < k; ++q) sum += a.values[i * k + q] * b.values[q * n + j];
      expected[i * ldc + j] = static_cast<Acc>(alpha * sum + (beta == 0 ? 0 : i - j));
    }
  (parallel ? parallel_gemm<Acc> : gemm<Acc>)(m, n, k, alpha, a.view, b.view, beta, c.data(), ldc);
  ASSERT_EQ(c, expected) << "m " << m << " n " << n << " k " << k << " alpha " << alpha << " beta " << beta << " a "
                         << name(a_type) << " " << static_cast<int>(a_layout) << " b " << name(b_type) << " "
                         << static_cast<int>(b_layout);
}

TEST_P(GemmTest, EveryTypeAndLayoutExactly) {
  for (DType a_type : kFloatingTypes)
    for (DType b_type : kFloatingTypes)
      for (Layout a_layout : kLayouts)
        for (Layout b_layout : kLayouts) {
          const bool parallel = random_bits() % 4 == 0;
          ASSERT_NO_FATAL_FAILURE(expect_exact<float>(a_type, a_layout, b_type, b_layout, parallel));
          ASSERT_NO_FATAL_FAILURE(expect_exact<double>(a_type, a_layout, b_type, b_layout, parallel));
        }
}

TEST_P(GemmTest, EverySmallShapeExactly) {
  for (Index m = 1; m <= 14; ++m)
    for (Index n = 1; n <= 70; n += m < 8 ? 1 : 9)
      for (Layout layout : {Layout::rows, Layout::columns}) {
        const Index k = 1 + (m * n) % 19;
        const TestMatrix a(m, k, exact_values(m * k), DType::float32, layout);
        const TestMatrix b(k, n, exact_values(k * n), DType::float32, layout);
        std::vector<float> c(m * n), expected(m * n);
        for (Index i = 0; i < m; ++i)
          for (Index j = 0; j < n; ++j)
            for (Index q = 0; q < k; ++q)
              expected[i * n + j] += static_cast<float>(a.values[i * k + q] * b.values[q * n + j]);
        gemm<float>(m, n, k, 1, a.view, b.view, 0, c.data(), n);
        ASSERT_EQ(c, expected) << "m " << m << " n " << n << " k " << k;
      }
}

TEST_P(GemmTest, EmptyProducts) {
  const float one = 1;
  const Matrix matrix{&one, DType::float32, 1, 1};
  std::vector<float> c = {5, std::numeric_limits<float>::quiet_NaN(), 6};
  gemm<float>(0, 3, 2, 1, matrix, matrix, 0, nullptr, 3);
  gemm<float>(3, 0, 2, 1, matrix, matrix, 0, nullptr, 0);
  parallel_gemm<float>(0, 0, 0, 1, matrix, matrix, 0, nullptr, 0);
  gemm<float>(1, 1, 0, 1, matrix, matrix, 1, c.data(), 3);
  EXPECT_EQ(c[0], 5);
  parallel_gemm<float>(1, 2, 0, 1, matrix, matrix, 0, c.data(), 3);
  EXPECT_EQ(c, (std::vector<float>{0, 0, 6}));
}

TEST_P(GemmTest, NanAndInfinityStayInTheirRowsAndColumns) {
  const Index m = 7, n = 33, k = 20;
  std::vector<double> values = exact_values(m * k);
  values[2 * k + 3] = std::numeric_limits<double>::quiet_NaN();
  values[5 * k + 0] = std::numeric_limits<double>::infinity();
  const TestMatrix a(m, k, values, DType::bfloat16, Layout::rows);
  const TestMatrix b(k, n, std::vector<double>(k * n, 0.5), DType::float16, Layout::columns);
  std::vector<float> c(m * n);
  gemm<float>(m, n, k, 1, a.view, b.view, 0, c.data(), n);
  for (Index i = 0; i < m; ++i)
    for (Index j = 0; j < n; ++j) {
      EXPECT_EQ(std::isnan(c[i * n + j]), i == 2);
      EXPECT_EQ(std::isinf(c[i * n + j]), i == 5);
    }
}

template <class Acc>
void expect_within_bound(Index m, Index n, Index k) {
  const bool as_float = sizeof(Acc) == 4;
  const DType dtype = as_float ? DType::float32 : DType::float64;
  const TestMatrix a(m, k, normal_values(m * k, as_float), dtype, Layout::rows);
  const TestMatrix b(k, n, normal_values(k * n, as_float), dtype, Layout::columns);
  std::vector<Acc> c(m * n);
  const Acc alpha = Acc(0.3);
  gemm<Acc>(m, n, k, alpha, a.view, b.view, 0, c.data(), n);
  const double eps = std::numeric_limits<Acc>::epsilon() / 2, steps = std::min<double>(k, 256) + k / 256. + 2;
  double worst = 0, worst_relative = 0;
  for (Index i = 0; i < m; ++i)
    for (Index j = 0; j < n; ++j) {
      long double sum = 0, size = 0;
      for (Index q = 0; q < k; ++q) {
        const long double product = static_cast<long double>(a.values[i * k + q]) * b.values[q * n + j];
        sum += product;
        size += std::fabs(product);
      }
      const double error = static_cast<double>(std::fabs(c[i * n + j] - alpha * sum));
      worst = std::max(worst, error / static_cast<double>(size * alpha));
      worst_relative = std::max(worst_relative, error / static_cast<double>(alpha * std::sqrt(k)));
    }
  std::printf("%s %ldx%ldx%ld: worst error %.2f eps of sum |a b| (bound %.0f), %.1e of the result's scale\n",
              name(dtype), static_cast<long>(m), static_cast<long>(n), static_cast<long>(k), worst / eps, steps,
              worst_relative);
  EXPECT_LE(worst, steps * eps);
}

TEST_P(GemmTest, ErrorIsWithinTheStatedBound) {
  expect_within_bound<float>(20, 70, 2000);
  expect_within_bound<float>(3, 70, 5000);
  expect_within_bound<double>(20, 70, 2000);
}

/// Rows [first, first + m) and columns [0, n) of the product must have the bits that the whole product has there.
template <class Acc>
void expect_same_bits(const TestMatrix& a, const TestMatrix& b, const std::vector<Acc>& whole, Index first, Index m,
                      Index n, bool parallel) {
  std::vector<Acc> c(m * n);
  Matrix part = a.view;
  part.data = static_cast<const char*>(part.data) + first * part.row_stride * element_size(part.dtype);
  (parallel ? parallel_gemm<Acc> : gemm<Acc>)(m, n, a.cols, Acc(0.7), part, b.view, 0, c.data(), n);
  for (Index i = 0; i < m; ++i)
    ASSERT_EQ(std::memcmp(&c[i * n], &whole[(first + i) * b.cols], n * sizeof(Acc)), 0)
        << "m " << m << " n " << n << " row " << i;
}

template <class Acc>
void expect_bits_depend_on_operands_only() {
  const Index m = 230, n = 150, k = 600;
  const bool as_float = sizeof(Acc) == 4;
  std::vector<double> a_values = normal_values(m * k, as_float), b_values = normal_values(k * n, as_float);
  for (auto* values : {&a_values, &b_values})
    for (double& v : *values) v = to_float(to_bfloat16(v));
  std::vector<Acc> whole(m * n);
  const TestMatrix plain_a(m, k, a_values, as_float ? DType::float32 : DType::float64, Layout::rows);
  const TestMatrix plain_b(k, n, b_values, as_float ? DType::float32 : DType::float64, Layout::rows);
  gemm<Acc>(m, n, k, Acc(0.7), plain_a.view, plain_b.view, 0, whole.data(), n);
  for (DType dtype : {plain_a.view.dtype, DType::bfloat16})
    for (Layout layout : {Layout::rows, Layout::columns, Layout::both_strided}) {
      const TestMatrix a(m, k, a_values, dtype, layout), b(k, n, b_values, dtype, layout);
      for (Index rows : {1, 2, 3, 4, 5, 30, 230})
        for (Index cols : {1, 20, 150}) ASSERT_NO_FATAL_FAILURE(expect_same_bits(a, b, whole, 0, rows, cols, false));
      ASSERT_NO_FATAL_FAILURE(expect_same_bits(a, b, whole, 11, 1, n, false));
      for (int threads : {1, 2, 3, 5}) {
        set_num_threads(threads);
        ASSERT_NO_FATAL_FAILURE(expect_same_bits(a, b, whole, 0, m, n, true));
        ASSERT_NO_FATAL_FAILURE(expect_same_bits(a, b, whole, 3, 1, n, true));
      }
      set_num_threads(0);
    }
}

TEST_P(GemmTest, BitsDependOnOperandsOnly) {
  expect_bits_depend_on_operands_only<float>();
  expect_bits_depend_on_operands_only<double>();
}

TEST(GemmTest, InstructionSetsWithFusedMultiplyAddAgreeToTheBit) {
  if (!supported(Isa::avx512)) GTEST_SKIP() << "needs two such instruction sets";
  const Index m = 9, n = 70, k = 700;
  const TestMatrix a(m, k, normal_values(m * k, true), DType::float32, Layout::rows);
  const TestMatrix b(k, n, normal_values(k * n, true), DType::float32, Layout::columns);
  std::vector<float> narrow(m * n), wide(m * n);
  set_isa_for_test(Isa::avx2);
  gemm<float>(m, n, k, 1, a.view, b.view, 0, narrow.data(), n);
  set_isa_for_test(Isa::avx512);
  gemm<float>(m, n, k, 1, a.view, b.view, 0, wide.data(), n);
  EXPECT_EQ(narrow, wide);
}

DSM_INSTANTIATE_FOR_EACH_ISA(GemmTest);

}  // namespace
}  // namespace dsm::cpu
