// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/attention/split_kv.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <vector>

namespace dsm::split_kv {
namespace {

constexpr std::int64_t kManyBlocks = 1 << 20;  // of a long table
constexpr bool kInvariant = true;

/// Bytes for requests of so many tiles of 64 query rows.
std::size_t bytes(std::int64_t batch, std::int64_t tiles, bool batch_invariant = kInvariant) {
  const int parts = parts_of(tiles, kMostMultiprocessors, batch, kManyBlocks, batch_invariant);
  const bool cuts = cuts_requests(parts, batch, batch_invariant);
  return Workspace::bytes(batch, parts, cuts ? strips_of(1, 64 * tiles) : 0, batch_invariant);
}

TEST(SplitKv, InvariantPiecesFollowOneRequest) {
  EXPECT_EQ(invariant_pieces(1), kInvariantPieces);
  EXPECT_EQ(invariant_pieces(2), kInvariantPieces);
  EXPECT_EQ(invariant_pieces(kMostMultiprocessors / 2), 2);
  EXPECT_EQ(invariant_pieces(kMostMultiprocessors / 2 + 1), 1);
  EXPECT_EQ(invariant_pieces(1 << 20), 1);
  for (const std::int64_t batch : {1, 3, 4096}) {
    EXPECT_EQ(parts_of(1, kMostMultiprocessors, batch, kInvariantBlocks, kInvariant), batch);
    EXPECT_EQ(parts_of(1, kMostMultiprocessors, batch, kInvariantBlocks + 1, kInvariant), 2 * batch);
    EXPECT_EQ(parts_of(1, kMostMultiprocessors, batch, kManyBlocks, kInvariant), kInvariantPieces * batch);
  }
}

TEST(SplitKv, InvariantRequestsTakeTheirPiecesAlone) {
  constexpr std::size_t kStrip = 4 * (kStripValues + 2 * kStripRows), kTile = 4 * kStrip;
  for (const std::int64_t batch : {1, 4096})
    EXPECT_EQ(bytes(batch, 2), Workspace::bytes(batch, 0, 0, kInvariant) + batch * kInvariantPieces * 2 * kTile);
  // However many rows a request has, it takes no more than a tile of each multiprocessor's; prompts take nothing.
  for (std::int64_t tiles = 1; tiles < 2000; ++tiles) EXPECT_LE(bytes(1, tiles), kMostMultiprocessors * kTile + 256);
  EXPECT_LE(bytes(16, 1023), 4096u);
}

TEST(SplitKv, OthersTakeTwoPiecesAPart) {
  constexpr std::size_t kTile = 16 * (kStripValues + 2 * kStripRows);
  for (const std::int64_t batch : {1, 300})
    for (const std::int64_t tiles : {1, 2, 60})
      EXPECT_LE(bytes(batch, tiles, !kInvariant), 2 * kMostMultiprocessors * kTile + 4096);
}

/// How parts cut requests of so many blocks.
Line line_of(const std::vector<int>& blocks, int parts, int gap) {
  const auto shared_by = [](int what, int by) { return (what + by - 1) / by; };
  const int batch = static_cast<int>(blocks.size()), all = std::accumulate(blocks.begin(), blocks.end(), 0);
  return Line(gap, shared_by(all + batch * gap, parts), INT32_MAX, shared_by(batch, parts),
              *std::max_element(blocks.begin(), blocks.end()));
}
/// Pieces of all requests; expects that the parts' shares are all blocks, each once and in order.
int pieces_of(const std::vector<int>& blocks, int parts, int gap) {
  const Line line = line_of(blocks, parts, gap);
  int at = 0, pieces = 0;
  for (const int own : blocks) {
    int end = 0, owners = 0;
    for (int part = 0; part < parts; ++part) {
      const Line::Share share = line.share(part, at, own);
      if (!share.any) continue;
      EXPECT_EQ(share.begin, end);
      end = share.end, ++owners;
    }
    EXPECT_EQ(end, own);
    EXPECT_EQ(line.pieces(at, line.share(0, at, own)).count, owners);
    pieces += owners, at += line.stretch(own);
  }
  return pieces;
}

TEST(SplitKv, RequestsThatHardlyDifferStayWhole) {
  EXPECT_EQ(pieces_of(std::vector<int>(128, 64), 66, 1), 128);
  EXPECT_EQ(pieces_of(std::vector<int>(128, 64), 64, 1), 128);
  EXPECT_GT(pieces_of(std::vector<int>(128, 512), 33, 1), 128);  // the parts left over would have to do
  EXPECT_GT(pieces_of(std::vector<int>(100, 64), 66, 1), 100);
  std::vector<int> lengths(128, 64);
  for (int i = 0; i < 128; i += 2) lengths[i] = 63;
  EXPECT_EQ(pieces_of(lengths, 66, 1), 128);
  lengths[5] = 0;
  EXPECT_EQ(pieces_of(lengths, 66, 1), 128);
  lengths[7] = 80;
  EXPECT_GT(pieces_of(lengths, 66, 1), 128);
}

}  // namespace
}  // namespace dsm::split_kv
