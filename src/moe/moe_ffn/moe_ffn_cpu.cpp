// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <algorithm>
#include <numeric>
#include <type_traits>
#include <vector>

#include "src/core/parallel_for.h"
#include "src/cpu/convert.h"
#include "src/cpu/gemm.h"
#include "src/cpu/swiglu_row.h"
#include "src/cpu/tiles.h"
#include "src/cpu/visit_dtype.h"
#include "src/cpu/weights.h"
#include "src/moe/moe_ffn/moe_ffn.h"
#include "src/numerics/float_traits.h"

// A visit is one row of one expert's work. Experts are taken in groups of about kGroupVisits visits, in increasing
// order: inside a group, tiles first go through the up-projections into scratch memory of the group's size; then tiles
// of the result collect, expert after expert, what the group adds to them. Every tile of either kind is one thread's
// work from beginning to end, so the order of every sum is fixed.

namespace dsm {
namespace {

using Index = std::int64_t;

constexpr Index kGroupVisits = 2048;
constexpr Index kTileVisits = 192, kTileColumns = 256;  // of the up-projections and weight gradients
constexpr Index kTileTokens = 512, kTileHidden = 128;   // of sums over experts

/// An expert and the visits to it, [begin, begin + visits) in the plan's order.
template <class T>
struct Expert {
  const cpu::Weights* w13;
  const cpu::Weights* w2;
  Index number;  // of its matrices in w13 and w2
  Index intermediate;
  Index begin, visits;
  T* z;               // of its first visit; null when not kept
  T* dw13 = nullptr;  // null: no weight gradients
  T* dw2 = nullptr;
  Index offset = 0;  // of its first visit's activation in the group's scratch, in elements
};

/// All visits: routed ones in moe_permute's order, then every token's to the shared expert with score 1.
template <class T>
struct Plan {
  using A = Compute<T>;
  std::vector<std::int32_t> token, slot;  // of each visit; slots of routed visits only, the rest is -1
  std::vector<A> score;
  std::vector<Expert<T>> experts;  // the shared one last
  Index routed;
  cpu::Weights w13, w2, shared_w13, shared_w2;

  /// Args is MoeFfnArgs or MoeFfnBackwardArgs.
  template <class Args>
  explicit Plan(const Args& a)
      : w13(a.w13, a.w13_scales),
        w2(a.w2, a.w2_scales),
        shared_w13(a.shared_w13, a.shared_w13_scales),
        shared_w2(a.shared_w2, a.shared_w2_scales) {
    const Index tokens = a.x.size(0), topk = a.indices.size(1), count = a.w13.size(0);
    std::vector<std::int32_t> offsets(count + 1), row_of_slot(tokens * topk);
    slot.resize(tokens * topk);
    moe_permute({.indices = a.indices,
                 .expert_offsets = {offsets.data(), DType::int32, {count + 1}},
                 .row_of_slot = {row_of_slot.data(), DType::int32, {tokens, topk}},
                 .slot_of_row = {slot.data(), DType::int32, {tokens * topk}}});
    routed = offsets[count];
    slot.resize(routed);
    for (const std::int32_t s : slot) {
      token.push_back(static_cast<std::int32_t>(s / topk));
      score.push_back(a.weights.template as<const A>()[s]);
    }
    const Index intermediate = w2.columns();
    for (Index e = 0; e < count; ++e)
      experts.push_back({&w13, &w2, e, intermediate, offsets[e], offsets[e + 1] - offsets[e],
                         a.z ? a.z.template as<T>() + offsets[e] * 2 * intermediate : nullptr});
    if (!a.shared_w13) return;
    experts.push_back({&shared_w13, &shared_w2, 0, shared_w2.columns(), routed, tokens,
                       a.shared_z ? a.shared_z.template as<T>() : nullptr});
    token.resize(routed + tokens);
    std::iota(token.begin() + routed, token.end(), 0);
    score.resize(routed + tokens, A(1));
  }

  Plan(const Plan&) = delete;  // experts point into it
  Plan& operator=(const Plan&) = delete;

  /// Calls body(group, elements) for groups of experts with at least kGroupVisits visits (but the last) and their
  /// number of activations, offsets being set. Experts without visits take part only where their weights' gradients
  /// must become zero.
  template <class Body>
  void for_each_group(const Body& body) const {
    std::vector<Expert<T>> group;
    Index visits = 0, elements = 0;
    for (Expert<T> expert : experts) {
      if (expert.visits == 0 && !expert.dw13) continue;
      expert.offset = elements;
      visits += expert.visits;
      elements += expert.visits * expert.intermediate;
      group.push_back(expert);
      if (visits < kGroupVisits) continue;
      body(group, elements);
      group.clear();
      visits = elements = 0;
    }
    if (!group.empty()) body(group, elements);
  }
};

template <class T>
constexpr DType kDType = std::is_same_v<T, double>    ? DType::float64
                         : std::is_same_v<T, float>   ? DType::float32
                         : std::is_same_v<T, float16> ? DType::float16
                                                      : DType::bfloat16;

template <class T>
cpu::Matrix matrix(const T* data, Index row_stride, Index col_stride, const std::int32_t* rows = nullptr) {
  return {data, kDType<T>, row_stride, col_stride, rows};
}

/// The rows of x or dy that belong to a run of visits.
template <class T>
cpu::Matrix rows_of_visits(const TensorView& tensor, const Plan<T>& plan, Index first_visit, Index column = 0) {
  return matrix(tensor.as<const T>() + column, tensor.stride[0], 1, plan.token.data() + first_visit);
}

/// x[i] = T(x[i]).
template <class T>
void round_to(Compute<T>* x, Index n) {
  if constexpr (!std::is_same_v<T, Compute<T>>) {
    constexpr Index kPart = 512;
    T part[kPart];
    for (Index begin = 0; begin < n; begin += kPart) {
      const Index count = std::min(kPart, n - begin);
      cpu::narrow(x + begin, count, part, kDType<T>);
      cpu::widen(part, kDType<T>, count, x + begin);
    }
  }
}

/// What FP8 mode makes of weighted activations, from the beginning of a tile's row on.
template <class T>
void round_activation(Compute<T>* x, Index n) {
  static_assert(kTileColumns % cpu::kFp8Group == 0, "groups do not cross tiles");
  round_to<T>(x, n);
  cpu::round_to_fp8(x, n);
}

/// [tokens, hidden] sums in the wide type: the result's own memory where that is wide, else scratch.
template <class T>
class Sums {
 public:
  using A = Compute<T>;

  explicit Sums(const TensorView& result) : result_(result) {
    if constexpr (std::is_same_v<T, A>) {
      data_ = result.as<A>();
      std::fill_n(data_, result.numel(), A(0));
    } else {
      wide_.resize(result.numel());
      data_ = wide_.data();
    }
  }

  A* data() { return data_; }

  void store() {
    if (wide_.empty()) return;
    parallel_for(0, result_.numel(), 16384, [&](Index begin, Index end) {
      cpu::narrow(data_ + begin, end - begin, result_.as<T>() + begin, result_.dtype);
    });
  }

 private:
  TensorView result_;
  std::vector<A> wide_;
  A* data_;
};

/// sums[token] += score · product for the group's visits, by increasing expert, where multiply(expert, visit, rows,
/// column, columns, product) gives `rows` visits' products with a matrix of the expert; scores null: 1. `rounded`:
/// every product is rounded to T first.
template <class T, class Multiply>
void add_products(const Plan<T>& plan, const std::vector<Expert<T>>& group, Index tokens, Index hidden,
                  const Multiply& multiply, const Compute<T>* scores, bool rounded, Compute<T>* sums) {
  using A = Compute<T>;
  cpu::over_tiles({{tokens, hidden}}, kTileTokens, kTileHidden, [&](const cpu::Tile& tile) {
    A* product = cpu::tile_scratch<A>(kTileVisits * tile.columns);
    for (const Expert<T>& expert : group) {
      // An expert's visits are in token order: those of the tile's tokens are neighbours.
      const auto first = plan.token.begin() + expert.begin, last = first + expert.visits;
      const Index begin = std::lower_bound(first, last, tile.row) - plan.token.begin();
      const Index end = std::lower_bound(first, last, tile.row + tile.rows) - plan.token.begin();
      for (Index visit = begin; visit < end; visit += kTileVisits) {
        const Index rows = std::min(kTileVisits, end - visit);
        multiply(expert, visit - expert.begin, rows, tile.column, tile.columns, product);
        if (rounded) round_to<T>(product, rows * tile.columns);
        for (Index r = 0; r < rows; ++r) {
          const A score = scores ? scores[visit + r] : A(1);
          A* sum = sums + plan.token[visit + r] * hidden + tile.column;
          for (Index h = 0; h < tile.columns; ++h) sum[h] += score * product[r * tile.columns + h];
        }
      }
    }
  });
}

// --- forward ---

/// z = x · w13ᵀ into the expert's z, if kept, and swiglu(z) into `act`, for one tile of visits x intermediate. With FP8
/// activations `act` becomes what MoeFfnArgs says: weighted, and rounded twice.
template <class T>
void project_up(const MoeFfnArgs& a, const Plan<T>& plan, const cpu::Activations& x, const Expert<T>& expert,
                const cpu::Tile& tile, Compute<T>* act) {
  using A = Compute<T>;
  const Index intermediate = expert.intermediate, width = tile.columns;
  const bool fp8 = a.activation_format == ActivationFormat::fp8;
  A* gate = cpu::tile_scratch<A>(2 * tile.rows * width);
  A* up = gate + tile.rows * width;
  const cpu::Matrix rows = x.chosen(plan.token.data() + expert.begin + tile.row);
  expert.w13->multiply_transposed(expert.number, tile.column, tile.rows, width, rows, gate, width);
  expert.w13->multiply_transposed(expert.number, intermediate + tile.column, tile.rows, width, rows, up, width);
  if (fp8) round_to<T>(gate, 2 * tile.rows * width);
  for (Index r = 0; r < tile.rows; ++r) {
    const A *g = gate + r * width, *u = up + r * width;
    if (expert.z) {
      T* z = expert.z + (tile.row + r) * 2 * intermediate + tile.column;
      cpu::narrow(g, width, z, kDType<T>);
      cpu::narrow(u, width, z + intermediate, kDType<T>);
    }
    A* act_row = act + expert.offset + (tile.row + r) * intermediate + tile.column;
    cpu::swiglu_row(g, u, width, static_cast<A>(a.swiglu_limit), act_row);
    if (!fp8) continue;
    cpu::scale(act_row, width, plan.score[expert.begin + tile.row + r]);
    round_activation<T>(act_row, width);
  }
}

template <class T>
void forward(const MoeFfnArgs& a) {
  using A = Compute<T>;
  const Plan<T> plan(a);
  const Index tokens = a.x.size(0), hidden = a.x.size(1);
  const bool fp8 = a.activation_format == ActivationFormat::fp8;
  const cpu::Activations x(a.x, tokens, a.activation_format);
  Sums<T> y(a.y);
  std::vector<A> act;
  plan.for_each_group([&](const std::vector<Expert<T>>& group, Index elements) {
    if (static_cast<Index>(act.size()) < elements) act.resize(elements);
    std::vector<cpu::Extent> activations;
    for (const Expert<T>& expert : group) activations.push_back({expert.visits, expert.intermediate});
    cpu::over_tiles(activations, kTileVisits, kTileColumns,
                    [&](const cpu::Tile& tile) { project_up(a, plan, x, group[tile.matrix], tile, act.data()); });
    const auto project_down = [&](const Expert<T>& e, Index visit, Index rows, Index column, Index columns, A* out) {
      const cpu::Matrix left = matrix(act.data() + e.offset + visit * e.intermediate, e.intermediate, 1);
      e.w2->multiply_transposed(e.number, column, rows, columns, left, out, columns);
    };
    add_products(plan, group, tokens, hidden, project_down, fp8 ? nullptr : plan.score.data(), fp8, y.data());
  });
  y.store();
  if (a.z) std::fill(a.z.as<T>() + plan.routed * a.z.size(1), a.z.as<T>() + a.z.numel(), T{});
}

// --- backward ---

/// From dy and z: score · swiglu(z) into `act`, dz into `dz`, and the pair's dweight, for a tile of visits.
template <class T>
void project_back(const MoeFfnBackwardArgs& a, const Plan<T>& plan, const Expert<T>& expert, const cpu::Tile& tile,
                  Compute<T>* act, Compute<T>* dz) {
  using A = Compute<T>;
  const Index intermediate = expert.intermediate;
  const A limit = static_cast<A>(a.swiglu_limit);
  const cpu::Matrix dy = rows_of_visits(a.dy, plan, expert.begin + tile.row);
  A* da = cpu::tile_scratch<A>(tile.rows * kTileColumns);
  std::vector<A> dscore(tile.rows);
  for (Index column = 0; column < intermediate; column += kTileColumns) {
    const Index width = std::min(kTileColumns, intermediate - column);
    expert.w2->multiply(expert.number, column, tile.rows, width, dy, da, width);
    for (Index r = 0; r < tile.rows; ++r) {
      const Index row = tile.row + r;
      const T* z = expert.z + row * 2 * intermediate + column;
      A* act_row = act + expert.offset + row * intermediate + column;
      A* dgate = dz + 2 * (expert.offset + row * intermediate) + column;
      A* dup = dgate + intermediate;
      const A score = plan.score[expert.begin + row];
      cpu::widen(z, kDType<T>, width, dgate);
      cpu::widen(z + intermediate, kDType<T>, width, dup);
      cpu::swiglu_backward_row(da + r * width, score, dgate, dup, width, limit, act_row, dgate, dup);
      dscore[r] += cpu::dot(act_row, da + r * width, width);
      cpu::scale(act_row, width, score);
      if (a.activation_format == ActivationFormat::fp8) round_activation<T>(act_row, width);
    }
  }
  for (Index r = 0; r < tile.rows; ++r) {
    const Index visit = expert.begin + tile.row + r;
    if (visit < plan.routed) a.dweights.as<A>()[plan.slot[visit]] = dscore[r];
  }
}

/// out[i, j] = Σ left[visit, i] · right[visit, j] for a tile; element (i, j) of out is at i · row_stride + j ·
/// col_stride. left holds the expert's visits side by side, its rows `width` apart.
template <class T>
void sum_outer_products(const Expert<T>& expert, const Compute<T>* left, Index width, const cpu::Matrix& right,
                        const cpu::Tile& tile, T* out, Index row_stride, Index col_stride) {
  using A = Compute<T>;
  A* sum = cpu::tile_scratch<A>(tile.rows * tile.columns);
  cpu::gemm<A>(tile.rows, tile.columns, expert.visits, 1, matrix(left + tile.row, 1, width), right, 0, sum,
               tile.columns);
  out += tile.row * row_stride + tile.column * col_stride;
  if (col_stride == 1) {
    for (Index i = 0; i < tile.rows; ++i)
      cpu::narrow(sum + i * tile.columns, tile.columns, out + i * row_stride, kDType<T>);
  } else {
    for (Index j = 0; j < tile.columns; ++j)
      for (Index i = 0; i < tile.rows; ++i) out[i * row_stride + j * col_stride] = narrow<T>(sum[i * tile.columns + j]);
  }
}

/// Of those experts of the group that have them.
template <class T>
void weight_gradients(const MoeFfnBackwardArgs& a, const Plan<T>& plan, const cpu::Activations& x,
                      const std::vector<Expert<T>>& group, const Compute<T>* act, const Compute<T>* dz) {
  const Index hidden = a.x.size(1);
  std::vector<cpu::Extent> w13, w2;
  for (const Expert<T>& expert : group) {
    w13.push_back({expert.dw13 ? 2 * expert.intermediate : 0, hidden});
    w2.push_back({expert.dw2 ? expert.intermediate : 0, hidden});
  }
  cpu::over_tiles(w13, kTileVisits, kTileColumns, [&](const cpu::Tile& tile) {
    const Expert<T>& e = group[tile.matrix];
    sum_outer_products(e, dz + 2 * e.offset, 2 * e.intermediate, x.chosen(plan.token.data() + e.begin, tile.column),
                       tile, e.dw13, hidden, 1);
  });
  cpu::over_tiles(w2, kTileVisits, kTileColumns, [&](const cpu::Tile& tile) {
    const Expert<T>& e = group[tile.matrix];
    sum_outer_products(e, act + e.offset, e.intermediate, rows_of_visits(a.dy, plan, e.begin, tile.column), tile, e.dw2,
                       1, e.intermediate);
  });
}

template <class T>
void set_weight_gradients(const MoeFfnBackwardArgs& a, std::vector<Expert<T>>& experts) {
  const Index routed = a.w13.size(0);
  for (Index e = 0; a.dw13 && e < routed; ++e) {
    experts[e].dw13 = a.dw13.as<T>() + e * a.w13.stride[0];
    experts[e].dw2 = a.dw2.as<T>() + e * a.w2.stride[0];
  }
  if (!a.dshared_w13) return;
  experts[routed].dw13 = a.dshared_w13.as<T>();
  experts[routed].dw2 = a.dshared_w2.as<T>();
}

template <class T>
void backward(const MoeFfnBackwardArgs& a) {
  using A = Compute<T>;
  Plan<T> plan(a);
  set_weight_gradients(a, plan.experts);
  const Index tokens = a.x.size(0), hidden = a.x.size(1);
  std::fill_n(a.dweights.as<A>(), a.dweights.numel(), A(0));
  const cpu::Activations x(a.x, a.dw13 || a.dshared_w13 ? tokens : 0, a.activation_format);
  Sums<T> dx(a.dx);
  std::vector<A> act, dz;
  plan.for_each_group([&](const std::vector<Expert<T>>& group, Index elements) {
    if (static_cast<Index>(act.size()) < elements) {
      act.resize(elements);
      dz.resize(2 * elements);
    }
    std::vector<cpu::Extent> visits;
    for (const Expert<T>& expert : group) visits.push_back({expert.visits, 1});
    cpu::over_tiles(visits, kTileVisits, 1, [&](const cpu::Tile& tile) {
      project_back(a, plan, group[tile.matrix], tile, act.data(), dz.data());
    });
    const auto through_w13 = [&](const Expert<T>& e, Index visit, Index rows, Index column, Index columns, A* out) {
      const cpu::Matrix left = matrix(dz.data() + 2 * (e.offset + visit * e.intermediate), 2 * e.intermediate, 1);
      e.w13->multiply(e.number, column, rows, columns, left, out, columns);
    };
    add_products<T>(plan, group, tokens, hidden, through_w13, nullptr, false, dx.data());
    weight_gradients(a, plan, x, group, act.data(), dz.data());
  });
  dx.store();
}

}  // namespace

void moe_ffn_cpu(const MoeFfnArgs& args, const Launch&) {
  cpu::visit_floating(args.x.dtype, [&]<class T>() { forward<T>(args); });
}

void moe_ffn_backward_cpu(const MoeFfnBackwardArgs& args, const Launch&) {
  cpu::visit_floating(args.x.dtype, [&]<class T>() { backward<T>(args); });
}

}  // namespace dsm
