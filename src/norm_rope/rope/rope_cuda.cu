// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
// Bound by memory. The work is one list of items, token after token and head after head: first those that copy one pack
// of the untouched part, then those that rotate as many pairs as a pack has elements, which are two packs. A block
// takes the same number of items whatever the shape. It first computes the rotations of its tokens into a table in
// shared memory; where few heads share a rotation, every thread computes its own in registers instead. With one head
// and 16-bit elements that is 50 instructions a rotation, which keeps the issue slots busy for two thirds of the time.
//
// H200, part of the same run's copy bandwidth, bf16 | float32: 8192 tokens x 128 heads x 64: 97 | 98 %, 8192 x 64 x 512
// with 64 rotated: 92 | 97 %, 524288 x 1 x 64: 86 | 96 %. Anything between the loads of a thread's items that the
// compiler turns into a wait for them (a branch, a call, early unpacking) costs 15 %; blocks of 256 threads instead of
// 64 cost 1 to 10 %. With one head, one item a thread at higher occupancy, frequencies loaded as packs or along with
// the items, stores that pass the cache by, and the inverse folded into the position gained nothing or lost up to 8 %.

#include <algorithm>
#include <type_traits>

#include "src/cpu/visit_dtype.h"
#include "src/cuda/copy/pack.cuh"
#include "src/cuda/index/divider.cuh"
#include "src/cuda/launch/launch.h"
#include "src/norm_rope/rope/rope.h"
#include "src/numerics/rope.h"

namespace dsm {
namespace {

using cuda::Pack;

constexpr int kThreads = 64;
constexpr int kItemsPerThread = 2;  // loaded before the first is used
constexpr int kItemsPerBlock = kThreads * kItemsPerThread;
// A table pays when it has at most this fraction of the rotations that the block's items use. It then stays below the
// 48 KB that every device gives.
constexpr int kUsesOfTable = 2;

/// [tokens, heads, d] with the last dimension contiguous.
template <class T>
struct Heads {
  T* data;
  std::int64_t token_stride, head_stride;

  explicit Heads(const TensorView& view)
      : data(view.as<T>()), token_stride(view.stride[0]), head_stride(view.stride[1]) {}
  __device__ T* at(std::int64_t token, std::int64_t head) const {
    return data + token * token_stride + head * head_stride;
  }
};

/// The items, counted from the first of a token.
struct Items {
  std::uint32_t copies;  ///< of a head, where they come first; 0 when working in place
  std::int64_t total;
  cuda::Divider per_head, per_token, pairs;

  Items(const RopeArgs& a, int pack, bool in_place)
      : copies(in_place ? 0 : static_cast<std::uint32_t>((a.x.size(2) - 2 * a.inv_freq.size(0)) / pack)),
        per_head(copies + static_cast<std::uint32_t>(a.inv_freq.size(0) / pack)),
        per_token(per_head.divisor() * static_cast<std::uint32_t>(a.x.size(1))),
        pairs(std::max(1u, static_cast<std::uint32_t>(a.inv_freq.size(0)))) {
    total = a.x.size(0) * per_token.divisor();
  }

  __device__ std::int64_t token(std::int64_t item) const {
    return item >> 31 ? item / per_token.divisor() : per_token.quotient(static_cast<std::uint32_t>(item));
  }
};

/// Any rotation. A call, as its code for huge angles and for double would cost the kernel registers.
template <class A>
__device__ __noinline__ Rotation<A> any_rotation(float angle) {
  return rope_rotation<A>(angle);
}

/// The rotations of the pairs at a position.
template <class A>
struct Rotations {
  const std::int64_t* positions;
  const float* inv_freq;
  bool inverted;

  /// One of them, without a call: with packs in flight a call's saving of registers would wait for them.
  __device__ Rotation<A> operator()(std::int64_t position, int pair) const {
    const Rotation<A> forward = rope_rotation<A>(rope_angle(position, inv_freq[pair]));
    return inverted ? inverse(forward) : forward;
  }

  /// N neighbours.
  template <int N>
  __device__ __forceinline__ void operator()(std::int64_t position, int pair, Rotation<A> (&to)[N]) const {
    float angle[N];
    bool near = std::is_same_v<A, float>;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      angle[j] = rope_angle(position, inv_freq[pair + j]);
      near = near && fabsf(angle[j]) <= kSincosNear;
      if constexpr (std::is_same_v<A, float>) {
        const SinCos<float> both = sincos_near(angle[j]);
        to[j] = {both.cos, both.sin};
      }
    }
    if (!near) {
#pragma unroll
      for (int j = 0; j < N; ++j) to[j] = any_rotation<A>(angle[j]);
    }
    if (!inverted) return;
#pragma unroll
    for (int j = 0; j < N; ++j) to[j] = inverse(to[j]);
  }
};

template <class T, int W, bool kInterleaved, bool kTable>
__global__ void __launch_bounds__(kThreads, 16)
    rope_cuda_kernel(Heads<const T> x, Heads<T> y, Rotations<Compute<T>> rotations, Items items, int copied) {
  using A = Compute<T>;
  constexpr int kAtOnce = W < 4 ? W : 4;  // rotations that a thread holds
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto* table = reinterpret_cast<Rotation<A>*>(shared_bytes);

  const std::int64_t begin = std::int64_t{blockIdx.x} * kItemsPerBlock;
  const int pairs = items.pairs.divisor();
  const std::int64_t first_token = items.token(begin);
  const auto skipped = static_cast<std::uint32_t>(begin - first_token * items.per_token.divisor());
  const auto count = static_cast<std::uint32_t>(min(std::int64_t{kItemsPerBlock}, items.total - begin));

  struct Item {
    T* to;
    std::int64_t position;  // without a table
    int pair;               // the first, negative in a copy
    int rotation;           // its place in the table
    Pack<T, W> a, b;
  } held[kItemsPerThread];
  // The second pack of a rotation: behind the first when pairs are neighbours, in the other half otherwise.
  const int partner = kInterleaved ? W : pairs;
#pragma unroll
  for (int i = 0; i < kItemsPerThread; ++i) {
    // No branches: they would make the next item's loads wait for these. Threads without an item load the last one,
    // and a copy loads its pack twice.
    const std::uint32_t index = min(i * kThreads + threadIdx.x, count - 1);
    Item& item = held[i];
    const std::uint32_t token = items.per_token.quotient(skipped + index);
    const std::uint32_t in_token = skipped + index - token * items.per_token.divisor();
    const std::uint32_t head = items.per_head.quotient(in_token);
    const std::uint32_t in_head = in_token - head * items.per_head.divisor();
    item.pair = static_cast<int>(in_head - items.copies) * W;
    const int offset = item.pair < 0 ? in_head * W : copied + item.pair * (kInterleaved ? 2 : 1);
    const T* from = x.at(first_token + token, head) + offset;
    item.to = y.at(first_token + token, head) + offset;
    item.a = cuda::load_pack<W>(from);
    item.b = cuda::load_pack<W>(from + (item.pair < 0 ? 0 : partner));
    if constexpr (kTable)
      item.rotation = token * pairs + item.pair;
    else
      item.position = rotations.positions[first_token + token];
  }
  if constexpr (kTable) {
    const std::uint32_t tokens = items.per_token.quotient(skipped + count - 1) + 1;
    for (std::uint32_t i = threadIdx.x; i < tokens * pairs; i += kThreads) {
      const std::uint32_t token = items.pairs.quotient(i);
      table[i] = rotations(rotations.positions[first_token + token], i - token * pairs);
    }
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < kItemsPerThread; ++i) {
    if (i * kThreads + threadIdx.x >= count) continue;
    Item& item = held[i];
    cuda::use_from_here(item.a);
    cuda::use_from_here(item.b);
    if (item.pair < 0) {
      cuda::store_pack(item.to, item.a);
      continue;
    }
    const auto element = [&](int k) -> T& { return k < W ? item.a.at[k] : item.b.at[k - W]; };
#pragma unroll
    for (int begin = 0; begin < W; begin += kAtOnce) {
      Rotation<A> rotation[kAtOnce];
      if constexpr (kTable) {
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) rotation[j] = table[item.rotation + begin + j];
      } else {
        rotations(item.position, item.pair + begin, rotation);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int pair = begin + j;
        T& first = element(kInterleaved ? 2 * pair : pair);
        T& second = element(kInterleaved ? 2 * pair + 1 : W + pair);
        A v = cuda::widened(first), w = cuda::widened(second);
        rotate(rotation[j], v, w);
        first = cuda::narrowed<T>(v);
        second = cuda::narrowed<T>(w);
      }
    }
    cuda::store_pack(item.to, item.a);
    cuda::store_pack(item.to + partner, item.b);
  }
}

template <class T, int W, bool kInterleaved>
void launch_rope(const RopeArgs& a, const Launch& launch) {
  using A = Compute<T>;
  const std::int64_t pairs = a.inv_freq.size(0), copied = a.x.size(2) - 2 * pairs;
  const bool in_place = a.x.data == a.y.data && a.x.stride == a.y.stride;
  if (a.x.numel() == 0 || (in_place && pairs == 0)) return;
  const Items items(a, W, in_place);
  // A block's items can begin and end inside a token. Without pairs there are only copies, and nothing to tabulate.
  const std::int64_t entries = (kItemsPerBlock / items.per_token.divisor() + 2) * pairs;
  const bool table = pairs > 0 && entries * kUsesOfTable <= kItemsPerBlock * W;
  cuda::launch("rope", table ? rope_cuda_kernel<T, W, kInterleaved, true> : rope_cuda_kernel<T, W, kInterleaved, false>,
               dim3(cuda::ceil_div<std::int64_t>(items.total, kItemsPerBlock)), dim3(kThreads),
               table ? sizeof(Rotation<A>) * entries : 0, launch, Heads<const T>(a.x), Heads<T>(a.y),
               Rotations<A>{a.positions.as<const std::int64_t>(), a.inv_freq.as<const float>(), a.inverse}, items,
               static_cast<int>(copied));
}

template <class T, int W>
void launch_rope(const RopeArgs& a, const Launch& launch) {
  a.interleaved ? launch_rope<T, W, true>(a, launch) : launch_rope<T, W, false>(a, launch);
}

}  // namespace

void rope_cuda(const RopeArgs& args, const Launch& launch) {
  cpu::visit_floating(args.x.dtype, [&]<class T>() {
    constexpr int kPack = cuda::kPackSize<T>;
    const std::int64_t pairs = args.inv_freq.size(0), copied = args.x.size(2) - 2 * pairs;
    const bool packs = cuda::packable({args.x, args.y}) && copied % kPack == 0 && pairs % kPack == 0;
    packs ? launch_rope<T, kPack>(args, launch) : launch_rope<T, 1>(args, launch);
  });
}

}  // namespace dsm
