// Products of blocks of bfloat16 in AMX's tiles, summed in float32: for 32 channels a head, which are 16 units. A tile
// that is multiplied from the left holds rows of 16 units, from the right 16 units of 16 columns.
#pragma once

#include "matmul.h"

#if defined(__AMX_BF16__)
namespace {

constexpr int kTileDim = 32, kSquare = 16 * 16;

// GCC doesn't tell its optimiser that tiles, and their shapes, are read from memory.
#define TILES_READ(p) asm volatile("" ::"r"(p) : "memory")

// Products of blocks; what is left over as Halves.
struct Tiles : Halves {
  static constexpr bool kTiles = true;
  // Tiles 0 to 2 have kRows rows, the other five 16; all have rows of 64 bytes.
  struct State {
    State() {
      struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {kRows, kRows, kRows, 16, 16, 16, 16, 16};
      } shapes;
      TILES_READ(&shapes);
      _tile_loadconfig(&shapes);
    }
    ~State() { _tile_release(); }
    State(const State&) = delete;
  };
};

// to[i][j] = rows[i] . panels[j]: kRows rows against `count` rows in panels.
INLINE void score_block(const uint32_t* rows, const uint32_t* panels, int count, float* to, int stride) {
  TILES_READ(rows);
  _tile_loadd(2, rows, 64);
  int j = 0;
  for (; j + 32 <= count; j += 32) {
    _tile_loadd(3, panels + j * 16, 64);
    _tile_loadd(4, panels + j * 16 + kSquare, 64);
    _tile_zero(0);
    _tile_zero(1);
    _tile_dpbf16ps(0, 2, 3);
    _tile_dpbf16ps(1, 2, 4);
    _tile_stored(0, to + j, stride * sizeof(float));
    _tile_stored(1, to + j + 16, stride * sizeof(float));
  }
  if (j < count) {
    _tile_loadd(3, panels + j * 16, 64);
    _tile_zero(0);
    _tile_dpbf16ps(0, 2, 3);
    _tile_stored(0, to + j, stride * sizeof(float));
  }
}

// accumulate() where the units of a row follow each other.
template <>
INLINE void accumulate<Tiles>(float* y, const uint32_t* a, int row_step, int unit_step, const uint32_t* b, int units,
                              int dim) {
  const int tiled = units / 16 * 16;
  if (tiled) {
    TILES_READ(y);
    _tile_loadd(0, y, kTileDim * sizeof(float));
    _tile_loadd(1, y + 16, kTileDim * sizeof(float));
    for (int k = 0; k < tiled; k += 16) {
      _tile_loadd(2, a + k, row_step * sizeof(uint32_t));
      _tile_loadd(3, b + k * kTileDim, kTileDim * sizeof(uint32_t));
      _tile_loadd(4, b + k * kTileDim + 16, kTileDim * sizeof(uint32_t));
      _tile_dpbf16ps(0, 2, 3);
      _tile_dpbf16ps(1, 2, 4);
    }
    _tile_stored(0, y, kTileDim * sizeof(float));
    _tile_stored(1, y + 16, kTileDim * sizeof(float));
  }
  if (tiled < units) accumulate<Halves>(y, a + tiled, row_step, unit_step, b + tiled * dim, units - tiled, dim);
}

// y[j / 16][d][j % 16] += sum over k < units of a[k][j] * b[d][k], for j < count. Units, a multiple of 16, stand in b as
// to_left_tiles() leaves them.
INLINE void accumulate_across(float* y, const uint32_t* a, int stride, const uint32_t* b, int units, int count) {
  TILES_READ(y);
  for (int j = 0; j < count; j += 16) {
    float* to = y + j * kTileDim;
    _tile_loadd(3, to, 64);
    _tile_loadd(4, to + kSquare, 64);
    for (int k = 0; k < units; k += 16) {
      _tile_loadd(5, a + k * stride + j, stride * sizeof(uint32_t));
      _tile_loadd(6, b + k * kTileDim, 64);
      _tile_loadd(7, b + k * kTileDim + kSquare, 64);
      _tile_dpbf16ps(3, 6, 5);
      _tile_dpbf16ps(4, 7, 5);
    }
    _tile_stored(3, to, 64);
    _tile_stored(4, to + kSquare, 64);
  }
}

// Columns of 16 units at a time, in place: [unit][d] -> [d][unit], two tiles.
INLINE void to_left_tiles(uint32_t* columns, int units) {
  alignas(64) uint32_t tiles[2 * kSquare];
  for (; units > 0; units -= 16, columns += 2 * kSquare) {
    transpose_square(columns, kTileDim, tiles);
    transpose_square(columns + 16, kTileDim, tiles + kSquare);
    __builtin_memcpy(columns, tiles, sizeof(tiles));
  }
}

// What accumulate_across() summed, in place: [j / 16][d][j % 16] -> [j][d].
INLINE void to_rows(float* y, int count) {
  alignas(64) float tiles[2 * kSquare];
  for (int j = 0; j < count; j += 16, y += 2 * kSquare) {
    transpose_square(y, 16, tiles);
    transpose_square(y + kSquare, 16, tiles + kSquare);
    for (int i = 0; i < 16; i++) {
      store(y + i * kTileDim, load(tiles + i * 16));
      store(y + i * kTileDim + 16, load(tiles + kSquare + i * 16));
    }
  }
}

}  // namespace
#endif
