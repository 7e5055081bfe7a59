// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
// Bound by memory, if the loads of the next row are in flight while a row waits for its sum: the blocks stay for many
// rows, and fetch one row ahead. A row is handled by as many threads as hold all of it, so that it is read once; what
// does not fit is read again, from the L2 cache. In the backward kernel a thread always sees the same columns and
// sums their dweight in registers; a second kernel adds up the blocks' sums in a fixed order.
//
// H200, part of the same run's copy bandwidth, bf16 | float32: forward 8192 x 7168: 88 | 90 %, 65536 x 2048: 87 | 89 %;
// backward, the sum of dweight included, 86 | 94 % and 91 | 94 %. Instructions are the second limit in bf16: widening
// the weight anew for each row cost 8 %.
#include <algorithm>

#include "src/cpu/visit_dtype.h"
#include "src/cuda/copy/ahead.cuh"
#include "src/cuda/copy/pack.cuh"
#include "src/cuda/launch/launch.h"
#include "src/cuda/reduce/row_sum.cuh"
#include "src/norm_rope/rms_norm/rms_norm.h"

namespace dsm {
namespace {

using cuda::Pack;

constexpr int kHeld = 2;               // packs of a row that a thread holds in registers
constexpr int kShortRowThreads = 256;  // of a block that handles several rows
constexpr int kMaxThreads = 1024;
constexpr int kMaxBackwardThreads = 896;  // with 72 registers each

/// The rows of a matrix whose last dimension is contiguous.
template <class T>
struct Rows {
  T* data;
  std::int64_t stride;

  explicit Rows(const TensorView& view) : data(view.as<T>()), stride(view.stride[0]) {}
  __device__ T* operator[](std::int64_t row) const { return data + row * stride; }
};

/// The weight in x's dtype or in the wide one, or absent.
template <class T>
struct Weight {
  const T* same = nullptr;
  const Compute<T>* wide = nullptr;

  explicit Weight(const TensorView& view) {
    if (view && element_size(view.dtype) == sizeof(T)) same = view.as<const T>();
    if (view && element_size(view.dtype) != sizeof(T)) wide = view.as<const Compute<T>>();
  }

  template <int W>
  __device__ void load(int column, Compute<T> (&to)[W]) const {
    if (same) return cuda::load_widened(same + column, to);
    if (wide) return cuda::load_widened(wide + column, to);
#pragma unroll
    for (Compute<T>& w : to) w = 1;
  }
};

/// How a matrix is laid over blocks: block.x threads along a row, block.y rows.
struct RowLayout {
  dim3 block;
  std::int64_t row_groups;  ///< of block.y rows
  bool held;                ///< a row fits into kHeld packs per thread

  RowLayout(std::int64_t rows, std::int64_t hidden, int pack, unsigned max_threads) {
    const std::int64_t wanted = cuda::ceil_div<std::int64_t>(hidden, std::int64_t{pack} * kHeld);
    unsigned threads = 1;
    while (threads < wanted && threads < cuda::kWarpSize) threads *= 2;
    while (threads < wanted && threads < max_threads) threads += cuda::kWarpSize;
    block = dim3(threads, threads > cuda::kWarpSize ? 1 : kShortRowThreads / threads);
    row_groups = cuda::ceil_div<std::int64_t>(rows, block.y);
    held = wanted <= threads;
  }
};

template <class T, int W>
__global__ void __launch_bounds__(kMaxThreads)
    rms_norm_cuda_kernel(Rows<const T> x, Weight<T> weight, Rows<T> y, Compute<T>* rstds, std::int64_t rows, int hidden,
                         Compute<T> eps) {
  using A = Compute<T>;
  __shared__ typename cuda::RowSum<A>::Storage storage;
  cuda::RowSum<A> row_sum(storage);
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const int first = threadIdx.x * W, step = blockDim.x * W, threads = blockDim.x * blockDim.y;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const auto slot = [&](int i) { return reinterpret_cast<Pack<T, W>*>(shared_bytes) + i * threads + thread; };
  const auto fetch = [&](std::int64_t row) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (row < rows && first + i * step < hidden) cuda::fetch_pack(slot(i), x[row] + first + i * step);
  };

  const unsigned row_step = gridDim.x * blockDim.y;
  std::int64_t row = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  fetch(row);
  for (; row - threadIdx.y < rows; row += row_step) {
    const int end = row < rows ? hidden : 0;  // threads without a row still take part in the sum
    Pack<T, W> held[kHeld];
    cuda::end_fetch_group();
    cuda::await_fetch_groups<0>();
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (first + i * step < end) held[i] = *slot(i);
    fetch(row + row_step);

    A squares = 0;
    const auto add_squares = [&](const Pack<T, W>& pack) {
#pragma unroll
      for (const T& element : pack.at) squares += cuda::widened(element) * cuda::widened(element);
    };
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (first + i * step < end) add_squares(held[i]);
    for (int column = first + kHeld * step; column < end; column += step)
      add_squares(cuda::load_pack<W>(x[row] + column));
    const A rstd = 1 / sqrt(row_sum(squares) / hidden + eps);

    const auto normalise = [&](const Pack<T, W>& pack, int column) {
      A w[W];
      weight.load(column, w);
#pragma unroll
      for (int j = 0; j < W; ++j) w[j] = cuda::widened(pack.at[j]) * rstd * w[j];
      cuda::store_narrowed(y[row] + column, w);
    };
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (first + i * step < end) normalise(held[i], first + i * step);
    for (int column = first + kHeld * step; column < end; column += step)
      normalise(cuda::load_pack<W>(x[row] + column), column);
    if (threadIdx.x == 0 && row < rows) rstds[row] = rstd;
  }
}

/// dx, and, with rows that fit into the held packs, in `partials` [gridDim.x, hidden] each block's sum of dweight over
/// its rows when partials is given.
template <class T, int W, bool kFits>
__global__ void __launch_bounds__(kMaxBackwardThreads)
    rms_norm_backward_cuda_kernel(Rows<const T> dy, Rows<const T> x, Weight<T> weight, const Compute<T>* rstds,
                                  Rows<T> dx, Compute<T>* partials, std::int64_t rows, int hidden) {
  using A = Compute<T>;
  __shared__ typename cuda::RowSum<A>::Storage storage;
  cuda::RowSum<A> row_sum(storage);
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const int first = threadIdx.x * W, step = blockDim.x * W, threads = blockDim.x * blockDim.y;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  // Two stages, of the row at work and of the next one; in a stage kHeld packs of dy, then of x.
  const auto slot = [&](int stage, int i) {
    return reinterpret_cast<Pack<T, W>*>(shared_bytes) + (stage * 2 * kHeld + i) * threads + thread;
  };
  // Behind them the thread's part of the weight, widened once for all rows.
  constexpr int kPart = W < cuda::kPackSize<A> ? W : cuda::kPackSize<A>, kParts = W / kPart;
  const auto weight_slot = [&](int i, int part) {
    return reinterpret_cast<Pack<A, kPart>*>(shared_bytes + 4 * kHeld * sizeof(Pack<T, W>) * threads) +
           (i * kParts + part) * threads + thread;
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (first + i * step >= hidden) continue;
    A w[W];
    weight.load(first + i * step, w);
#pragma unroll
    for (int j = 0; j < W; ++j) weight_slot(i, j / kPart)->at[j % kPart] = w[j];
  }
  const auto held_weight = [&](int i, A(&w)[W]) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const Pack<A, kPart> pack = cuda::load_pack<kPart>(weight_slot(i, part)->at);
#pragma unroll
      for (int j = 0; j < kPart; ++j) w[part * kPart + j] = pack.at[j];
    }
  };
  A dweight[kHeld][W] = {}, next_rstd = 0;
  const auto fetch = [&](std::int64_t row, int stage) {
    if (row < rows) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int column = first + i * step;
        if (column >= hidden) continue;
        cuda::fetch_pack(slot(stage, i), dy[row] + column);
        cuda::fetch_pack(slot(stage, kHeld + i), x[row] + column);
      }
      next_rstd = rstds[row];
    }
    cuda::end_fetch_group();
  };

  const unsigned row_step = gridDim.x * blockDim.y;
  std::int64_t row = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  int stage = 0;
  fetch(row, stage);
  for (; row - threadIdx.y < rows; row += row_step, stage ^= 1) {
    const int end = row < rows ? hidden : 0;
    const A rstd = next_rstd;
    fetch(row + row_step, stage ^ 1);
    cuda::await_fetch_groups<1>();

    A dot = 0;
    const auto add_dot = [&](const Pack<T, W>& d, const Pack<T, W>& v, const A(&w)[W]) {
#pragma unroll
      for (int j = 0; j < W; ++j) dot += cuda::widened(d.at[j]) * w[j] * cuda::widened(v.at[j]);
    };
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (first + i * step >= end) continue;
      A w[W];
      held_weight(i, w);
      add_dot(*slot(stage, i), *slot(stage, kHeld + i), w);
    }
    for (int column = first + kHeld * step; !kFits && column < end; column += step) {
      A w[W];
      weight.load(column, w);
      add_dot(cuda::load_pack<W>(dy[row] + column), cuda::load_pack<W>(x[row] + column), w);
    }
    const A pull = row_sum(dot) / hidden * rstd * rstd;

    const auto store_dx = [&](const Pack<T, W>& d, const Pack<T, W>& v, A(&w)[W], int column) {
#pragma unroll
      for (int j = 0; j < W; ++j) w[j] = rstd * (cuda::widened(d.at[j]) * w[j] - cuda::widened(v.at[j]) * pull);
      cuda::store_narrowed(dx[row] + column, w);
    };
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (first + i * step >= end) continue;
      // Read again: held in registers they would cost a block its place beside another.
      const Pack<T, W> d = *slot(stage, i), v = *slot(stage, kHeld + i);
      A w[W];
      held_weight(i, w);
      store_dx(d, v, w, first + i * step);
#pragma unroll
      for (int j = 0; kFits && j < W; ++j) dweight[i][j] += cuda::widened(d.at[j]) * (cuda::widened(v.at[j]) * rstd);
    }
    for (int column = first + kHeld * step; !kFits && column < end; column += step) {
      A w[W];
      weight.load(column, w);
      store_dx(cuda::load_pack<W>(dy[row] + column), cuda::load_pack<W>(x[row] + column), w, column);
    }
  }
  if (!kFits || !partials) return;

  // [blockDim.y, columns that the block's threads hold], in place of the slots.
  __syncthreads();
  A* sums = reinterpret_cast<A*>(shared_bytes);
  const int columns = step * kHeld;
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
#pragma unroll
    for (int j = 0; j < W; ++j) sums[threadIdx.y * columns + first + i * step + j] = dweight[i][j];
  __syncthreads();
  for (int column = threadIdx.y * blockDim.x + threadIdx.x; column < hidden; column += blockDim.x * blockDim.y) {
    A sum = 0;
    for (int y = 0; y < blockDim.y; ++y) sum += sums[y * columns + column];
    partials[std::int64_t{blockIdx.x} * hidden + column] = sum;
  }
}

/// The partial sums for rows that the kernel above cannot hold: a thread per column, gridDim.y runs of rows.
template <class T>
__global__ void rms_norm_dweight_cuda_kernel(Rows<const T> dy, Rows<const T> x, const Compute<T>* rstds,
                                             Compute<T>* partials, std::int64_t rows, int hidden) {
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= hidden) return;
  const std::int64_t run = (rows + gridDim.y - 1) / gridDim.y;
  const std::int64_t begin = blockIdx.y * run, end = min(begin + run, rows);
  Compute<T> sum = 0;
  for (std::int64_t row = begin; row < end; ++row)
    sum += cuda::widened(dy[row][column]) * (cuda::widened(x[row][column]) * rstds[row]);
  partials[std::int64_t{blockIdx.y} * hidden + column] = sum;
}

/// dweight from `count` partial sums, added in float64: 32 columns a block, 32 threads a column.
template <class A, class W>
__global__ void rms_norm_dweight_sum_cuda_kernel(const A* partials, int count, int hidden, W* dweight) {
  __shared__ double sums[cuda::kWarpSize][cuda::kWarpSize + 1];
  const int column = blockIdx.x * cuda::kWarpSize + threadIdx.x;
  double sum = 0;
  if (column < hidden)
    for (int i = threadIdx.y; i < count; i += cuda::kWarpSize) sum += partials[std::int64_t{i} * hidden + column];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  const double total = cuda::lane_group_sum(sums[threadIdx.x][threadIdx.y]);
  const int summed = blockIdx.x * cuda::kWarpSize + threadIdx.y;
  if (threadIdx.x == 0 && summed < hidden) dweight[summed] = cuda::narrowed<W>(static_cast<A>(total));
}

template <class T, int W>
void forward(const RmsNormArgs& a, const Launch& launch) {
  const std::int64_t rows = a.x.size(0);
  if (rows == 0) return;
  const char* name = "rms_norm";
  const RowLayout layout(rows, a.x.size(1), W, kMaxThreads);
  const int threads = layout.block.x * layout.block.y;
  const std::size_t shared = sizeof(Pack<T, W>) * kHeld * threads;
  cuda::allow_shared_bytes(name, rms_norm_cuda_kernel<T, W>, shared);
  const int resident = cuda::resident_blocks(name, rms_norm_cuda_kernel<T, W>, threads, shared);
  const auto blocks = static_cast<unsigned>(std::min<std::int64_t>(layout.row_groups, resident));
  cuda::launch(name, rms_norm_cuda_kernel<T, W>, dim3(blocks), layout.block, shared, launch, Rows<const T>(a.x),
               Weight<T>(a.weight), Rows<T>(a.y), a.rstd.as<Compute<T>>(), rows, static_cast<int>(a.x.size(1)),
               static_cast<Compute<T>>(a.eps));
}

/// Makes dx and, when asked for, partial sums of dweight; returns how many.
template <class T, int W>
int backward_rows(const RmsNormBackwardArgs& a, const Launch& launch) {
  using A = Compute<T>;
  const char* name = "rms_norm_backward";
  const std::int64_t rows = a.x.size(0);
  const int hidden = static_cast<int>(a.x.size(1));
  if (rows == 0 || hidden == 0) return 0;
  // Two stages of dy and x; the widened weight, in whose size the sums come later.
  constexpr std::size_t kSlots = 4 * kHeld * sizeof(Pack<T, W>), kWeight = kHeld * W * sizeof(A);
  const auto most_threads = static_cast<unsigned>(cuda::shared_bytes_limit(name) / (kSlots + kWeight));
  const RowLayout layout(rows, hidden, W,
                         std::min<unsigned>(kMaxBackwardThreads, most_threads / cuda::kWarpSize * cuda::kWarpSize));
  const int threads = layout.block.x * layout.block.y;
  const auto kernel =
      layout.held ? rms_norm_backward_cuda_kernel<T, W, true> : rms_norm_backward_cuda_kernel<T, W, false>;
  const std::size_t shared = (kSlots + kWeight) * threads;
  cuda::allow_shared_bytes(name, kernel, shared);
  const int resident = cuda::resident_blocks(name, kernel, threads, shared);
  const int blocks = static_cast<int>(std::min<std::int64_t>({layout.row_groups, resident, kDweightPartials}));
  A* partials = static_cast<A*>(launch.workspace);
  cuda::launch(name, kernel, dim3(blocks), layout.block, shared, launch, Rows<const T>(a.dy), Rows<const T>(a.x),
               Weight<T>(a.weight), a.rstd.as<const A>(), Rows<T>(a.dx), a.dweight ? partials : nullptr, rows, hidden);
  if (!a.dweight || layout.held) return blocks;
  const int runs = static_cast<int>(std::min(rows, kDweightPartials));
  cuda::launch(name, rms_norm_dweight_cuda_kernel<T>, dim3(cuda::ceil_div(hidden, kShortRowThreads), runs),
               dim3(kShortRowThreads), 0, launch, Rows<const T>(a.dy), Rows<const T>(a.x), a.rstd.as<const A>(),
               partials, rows, hidden);
  return runs;
}

template <class T>
void backward(const RmsNormBackwardArgs& a, const Launch& launch) {
  using A = Compute<T>;
  const bool packs = cuda::packable({a.dy, a.x, a.weight, a.dx}) && a.x.size(1) % cuda::kPackSize<T> == 0;
  const int partials = packs ? backward_rows<T, cuda::kPackSize<T>>(a, launch) : backward_rows<T, 1>(a, launch);
  const int hidden = static_cast<int>(a.x.size(1));
  if (!a.dweight || hidden == 0) return;
  const auto sum_up = [&]<class W>(W* dweight) {
    cuda::launch("rms_norm_backward", rms_norm_dweight_sum_cuda_kernel<A, W>,
                 dim3(cuda::ceil_div(hidden, cuda::kWarpSize)), dim3(cuda::kWarpSize, cuda::kWarpSize), 0, launch,
                 static_cast<const A*>(launch.workspace), partials, hidden, dweight);
  };
  a.dweight.dtype == a.x.dtype ? sum_up(a.dweight.as<T>()) : sum_up(a.dweight.as<A>());
}

}  // namespace

void rms_norm_cuda(const RmsNormArgs& args, const Launch& launch) {
  cpu::visit_floating(args.x.dtype, [&]<class T>() {
    const bool packs = cuda::packable({args.x, args.weight, args.y}) && args.x.size(1) % cuda::kPackSize<T> == 0;
    packs ? forward<T, cuda::kPackSize<T>>(args, launch) : forward<T, 1>(args, launch);
  });
}

void rms_norm_backward_cuda(const RmsNormBackwardArgs& args, const Launch& launch) {
  cpu::visit_floating(args.x.dtype, [&]<class T>() { backward<T>(args, launch); });
}

}  // namespace dsm
