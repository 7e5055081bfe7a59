// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "src/core/parallel_for.h"

namespace dsm::cpu {

struct Extent {
  std::int64_t rows, columns;
};

/// A part of one of several matrices.
struct Tile {
  std::int64_t matrix;
  std::int64_t row, rows;        ///< first and number of
  std::int64_t column, columns;  ///< first and number of
};

/// Calls body(tile) for the tiles of at most height x width that cover the given matrices, on all CPU threads: the unit
/// of work where matrices differ in size.
template <class Body>
void over_tiles(const std::vector<Extent>& matrices, std::int64_t height, std::int64_t width, const Body& body) {
  std::vector<Tile> tiles;
  for (std::size_t i = 0; i < matrices.size(); ++i) {
    const auto [rows, columns] = matrices[i];
    for (std::int64_t r = 0; r < rows; r += height)
      for (std::int64_t c = 0; c < columns; c += width)
        tiles.push_back({static_cast<std::int64_t>(i), r, std::min(height, rows - r), c, std::min(width, columns - c)});
  }
  parallel_for(0, static_cast<std::int64_t>(tiles.size()), 1, [&](std::int64_t begin, std::int64_t end) {
    for (; begin < end; ++begin) body(tiles[begin]);
  });
}

/// `count` elements that belong to the calling thread until its next call, contents arbitrary.
template <class T>
T* tile_scratch(std::int64_t count) {
  thread_local std::vector<T> memory;
  if (static_cast<std::int64_t>(memory.size()) < count) memory.resize(count);
  return memory.data();
}

}  // namespace dsm::cpu
