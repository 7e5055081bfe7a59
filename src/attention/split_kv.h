// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "dsm/launch.h"
#include "dsm/tensor_view.h"
#include "src/numerics/host_device.h"

namespace dsm::split_kv {

// Decoding with the keys of a request split between blocks of threads (CUDA). Keys come in blocks of equally many; all
// blocks of all requests, in their order, are cut into `parts` runs of equal cost, where beginning a request costs some
// blocks more; or every request has parts of its own, or every part as many whole requests, where parts are hardly
// longer for it. A part is computed by one thread block for each tile of query rows. What a part computes of a request
// is a piece: a request of one piece is finished by who computes it; the others' pieces go to the workspace, slot 2 ·
// part or, when the part has begun with another request, 2 · part + 1, and the combining kernel adds them up. For
// results that do not depend on the other requests, a part is one piece, whose length follows from the request's own.
// Every thread block finds its own part (split_kv.cuh): lengths are read on the device only, and nothing is planned
// beforehand.

/// What one part computes: requests first_request to last_request, of the first one from first_block on, of the last
/// one the blocks before end_block, all blocks of those between; and how many these are. last_request < first_request:
/// nothing.
struct Part {
  std::int32_t first_request, last_request, first_block, end_block, blocks;
};

/// The pieces of a request: the first one's slot; those after it have slots 2 · (first_slot / 2 + i).
struct Pieces {
  std::int32_t first_slot, count;

  /// Slot of piece i.
#ifdef __CUDACC__
  __host__ __device__
#endif
      std::int32_t slot(std::int32_t i) const {
    return i == 0 ? first_slot : 2 * (first_slot / 2 + i);
  }
};

inline constexpr int kBlockKeys = 64;
/// What a part with cuts at both ends takes longer for it, in blocks, at least and at most.
inline constexpr int kLeastCutBlocks = 3, kMostCutBlocks = 8;

DSM_HD_INLINE constexpr int blocks_of(int keys) { return (keys + kBlockKeys - 1) / kBlockKeys; }

/// Divides numbers below 2^31 by one of them, with one division for all.
struct Reciprocal {
  unsigned divisor = 1, inverse = ~0u;

  Reciprocal() = default;
  DSM_HD_INLINE explicit Reciprocal(unsigned d) : divisor(d), inverse(~0u / d) {}
  DSM_HD_INLINE int quotient(unsigned x) const {
    const auto low = static_cast<unsigned>(std::uint64_t{x} * inverse >> 32);  // at most one too small
    return static_cast<int>(low + (x - low * divisor >= divisor));
  }
  /// Rounded up.
  DSM_HD_INLINE int parts(unsigned x) const { return quotient(x + divisor - 1); }
};

/// How the keys are cut. Requests lie on a line in their order, and parts are stretches of the line of equal length.
/// Each request has parts of its own, as few as give none of them more blocks than the length; or requests follow each
/// other, each after a gap of the overhead; or they do so at equal distances, as many to a part, and none is cut.
class Line {
 public:
  Line() = default;
  /// Requests that follow each other make parts of `in_turn` blocks. For requests apart the parts are enough with
  /// `alone` blocks in each, and with `whole` requests, none above `most` blocks, in each: no worse while it is hardly
  /// more, as there are fewer pieces.
  DSM_HD_INLINE Line(int gap, int in_turn, int alone, int whole, int most) : gap_(gap) {
    int length = in_turn;
    if (alone <= longest_alone(in_turn))
      apart_ = true, gap_ = 0, length = alone;
    else if (whole * (most + gap) <= in_turn + largest(kLeastCutBlocks, least(in_turn / 16, kMostCutBlocks)))
      least_ = most + gap, length = whole * least_;
    length_ = Reciprocal(length);
  }
  DSM_HD_INLINE static int longest_alone(int in_turn) { return in_turn + in_turn / 32; }
  /// Requests apart.
  DSM_HD_INLINE explicit Line(Reciprocal alone) : apart_(true), length_(alone) {}

  /// What a request takes of the line.
  DSM_HD_INLINE int stretch(int blocks) const {
    return apart_ ? largest(length_.parts(blocks), 1) * length() : largest(blocks + gap_, least_);
  }
  /// What a part has of the request that begins at a place of the line: blocks [begin, end), if any() of it.
  struct Share {
    int first, last;  ///< of what has an owner: the blocks, or the end of its gap if the request has none
    int begin, end;
    bool any;

    DSM_HD_INLINE int blocks() const { return any ? end - begin : 0; }
  };
  DSM_HD_INLINE Share share(int part, int at, int blocks) const {
    const int first = at + gap_ - (blocks == 0 && gap_ > 0),
              last = at + gap_ + largest(blocks, 1) - 1 - (first < at + gap_);
    const int begin = part * length(), end = begin + length();
    return {first, last, largest(begin - at - gap_, 0), largest(least(end - at - gap_, blocks), 0),
            first < end && last >= begin};
  }
  DSM_HD_INLINE Pieces pieces(int at, const Share& share) const {
    const int first_part = length_.quotient(share.first);
    const bool begun = at > first_part * length() && !apart_;  // by the request before
    return {2 * first_part + begun, length_.quotient(share.last) - first_part + 1};
  }
  /// Whether a request of so many blocks, the most that one has, is one piece.
  DSM_HD_INLINE bool whole(int blocks) const { return apart_ ? length() >= blocks : least_ > 0; }
  DSM_HD_INLINE int length() const { return static_cast<int>(length_.divisor); }

 private:
  DSM_HD_INLINE static int least(int a, int b) { return a < b ? a : b; }
  DSM_HD_INLINE static int largest(int a, int b) { return a > b ? a : b; }

  bool apart_ = false;
  int gap_ = 0, least_ = 0;  ///< of what a request takes
  Reciprocal length_;
};

/// Where the number of keys of a request is found. Lists of a second cache begin on a block of their own.
struct Keys {
  std::int32_t batch;
  std::int32_t keys;                 ///< of every request, or at most where lengths are given
  const std::int32_t* length;        ///< [batch], or null
  std::int32_t extra_keys;           ///< of the second cache; 0: none
  const std::int32_t* extra_length;  ///< [batch], or null
  std::int32_t overhead_blocks;      ///< what beginning a request costs a part, at least 1
  std::int32_t invariant_pieces;     ///< at most, of a request that is cut by its own length alone; 0: it is not
  Reciprocal parts;                  ///< how many there are

  /// Whether all requests are cut alike, by a number of keys that is known beforehand.
  DSM_HD_INLINE bool equal() const { return !length && !extra_length && invariant_pieces == 0; }
};

/// How requests are cut that all have as many keys: known before anything of the device is read, by keys.parts.
struct EqualRequests {
  std::int32_t blocks = 0;  ///< of each
  Line line;
  Reciprocal stretch;  ///< of the line, of each

  EqualRequests() = default;
  explicit EqualRequests(const Keys& keys) : blocks(blocks_of(keys.keys) + blocks_of(keys.extra_keys)) {
    const auto shared_by = [](int what, int by) { return (what + by - 1) / by; };
    const auto parts = static_cast<int>(keys.parts.divisor);
    const int parts_of_each = keys.batch > 0 ? parts / keys.batch : 0, least = shared_by(keys.batch * blocks, parts);
    const int alone = parts_of_each > 0 ? std::max({least, shared_by(blocks, parts_of_each), 1}) : INT32_MAX;
    const int in_turn = std::max(shared_by(keys.batch * (blocks + keys.overhead_blocks), parts), 1);
    line = Line(keys.overhead_blocks, in_turn, alone, shared_by(keys.batch, parts), blocks);
    stretch = Reciprocal(line.stretch(blocks));
  }

  /// The part with number `number` of `batch` requests.
  DSM_HD_INLINE Part part(int number, int batch) const {
    const Line::Share of_first = share(number, 0);
    const int begin = number * line.length(), end = begin + line.length();
    const int behind = begin - of_first.last, last_begun = stretch.quotient(end - 1 - of_first.first);
    const int first = stretch.parts(behind > 0 ? behind : 0),
              last = end <= of_first.first ? -1 : (last_begun < batch - 1 ? last_begun : batch - 1);
    if (first > last) return {batch, -1, 0, 0, 0};
    const int first_block = share(number, first).begin, end_block = share(number, last).end;
    return {first, last, first_block, end_block, (last - first) * blocks + end_block - first_block};
  }
  /// As the part that computes it would write them down.
  DSM_HD_INLINE Pieces pieces(int request) const { return line.pieces(place(request), share(0, request)); }
  /// Whether each is one piece, so that there is nothing to add up.
  bool whole() const { return line.whole(blocks); }

 private:
  DSM_HD_INLINE int place(int request) const { return request * static_cast<int>(stretch.divisor); }
  DSM_HD_INLINE Line::Share share(int part, int request) const { return line.share(part, place(request), blocks); }
};

/// Batch-invariant pieces have at least so many blocks, and a request at most so many of them.
inline constexpr int kInvariantBlocks = 32, kInvariantPieces = 8;

/// Multiprocessors that are made use of, for which workspaces are large enough: what H100 and H200 have.
inline constexpr int kMostMultiprocessors = 132;
/// Parts are thread blocks of a grid's second dimension, which takes no more.
inline constexpr std::int64_t kMostParts = 65535;

/// Pieces of a batch-invariant request at most: no more than keep the multiprocessors busy with its tiles alone, as
/// their outputs take memory.
inline std::int32_t invariant_pieces(std::int64_t tiles) {
  return static_cast<std::int32_t>(
      std::clamp<std::int64_t>(kMostMultiprocessors / std::max<std::int64_t>(tiles, 1), 1, kInvariantPieces));
}

/// Parts for `tiles` tiles of query rows and up to `blocks` blocks of each request: as many as give each multiprocessor
/// one part of one tile; or, batch-invariant, as many as there can be pieces.
inline int parts_of(std::int64_t tiles, int multiprocessors, std::int64_t batch, std::int64_t blocks,
                    bool batch_invariant) {
  if (!batch_invariant)
    return static_cast<int>(std::max<std::int64_t>(std::min(multiprocessors, kMostMultiprocessors) / tiles, 1));
  const std::int64_t most =
      std::min<std::int64_t>((blocks + kInvariantBlocks - 1) / kInvariantBlocks, invariant_pieces(tiles));
  return static_cast<int>(batch * std::max<std::int64_t>(most, 1));
}
/// Whether a request can have several pieces.
inline bool cuts_requests(int parts, std::int64_t batch, bool batch_invariant) {
  return parts > (batch_invariant ? batch : 1);
}

/// A strip is 16 query rows: what a warp of a product of wgmma has. Where rows do not fill the last strip, or the last
/// one of a group of them that a tile keeps apart, what is missing is there all the same.
inline constexpr int kStripRows = 16;
inline constexpr int kStripValues = kStripRows * 512;

/// Device memory for the pieces of a call with `strips` strips of query rows per request and values of 512 columns, as
/// threads of wgmma have them.
struct Workspace {
  int parts, strips;
  bool batch_invariant;
  Pieces* pieces;  ///< [batch]
  /// [slots, strips, 16, 2]: reference point of the exponentials, base 2, and their sum; 0: no key, and values are
  /// not read.
  float* states;
  /// [slots, strips, 64, 32, 4]: columns 8 i + 2 q, + 1 of rows r and r + 8, for i below 64 and lane 4 r + q; not
  /// divided by the sum.
  float* values;

  static std::size_t bytes(std::int64_t batch, int parts, std::int64_t strips, bool batch_invariant) {
    return pieces_bytes(batch) +
           slots(parts, batch_invariant) * strips * (kStripRows * 2 * sizeof(float) + kStripValues * sizeof(float));
  }
  static Workspace at(void* memory, std::int64_t batch, int parts, std::int64_t strips, bool batch_invariant) {
    auto* const pieces = static_cast<std::byte*>(memory);
    auto* const states = reinterpret_cast<float*>(pieces + pieces_bytes(batch));
    return {.parts = parts,
            .strips = static_cast<int>(strips),
            .batch_invariant = batch_invariant,
            .pieces = reinterpret_cast<Pieces*>(pieces),
            .states = states,
            .values = states + slots(parts, batch_invariant) * strips * kStripRows * 2};
  }

  /// The first strip of a slot. Batch-invariant parts are one piece each: there are no odd slots.
#ifdef __CUDACC__
  __device__ std::int64_t first_strip(std::int32_t slot) const {
    return std::int64_t{slot >> static_cast<int>(batch_invariant)} * strips;
  }
#endif

 private:
  static std::size_t slots(int parts, bool batch_invariant) {
    return static_cast<std::size_t>(batch_invariant ? 1 : 2) * parts;
  }
  static std::size_t pieces_bytes(std::int64_t batch) { return (batch * sizeof(Pieces) + 255) / 256 * 256; }
};
/// Strips of a request whose query rows, positions times heads, come in groups of `rows`.
inline std::int64_t strips_of(std::int64_t groups, std::int64_t rows) {
  return groups * ((rows + kStripRows - 1) / kStripRows);
}

/// Adds up the pieces of the requests that have several, as the kernel after the one that wrote them on the stream.
/// `equal` where that did not write down which pieces there are, otherwise null.
/// out: [batch, s_q, h_q, 512] float16|bfloat16, rows and heads any distance apart (16-byte aligned); lse: [batch, h_q,
/// s_q], natural logarithm, +inf without keys; attn_sink: [h_q] float32 or absent.
void combine(const char* operation, const Workspace& workspace, const EqualRequests* equal, std::int64_t groups,
             const TensorView& attn_sink, const TensorView& out, const TensorView& lse, const Launch& launch);

}  // namespace dsm::split_kv
