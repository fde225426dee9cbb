// The bias of a query against all keys of its tile, without a matrix of queries x keys.
//
// Offsets along the rows of a tile repeat, so it is enough to expand the table's columns:
//   half[column of the query][row of the key - row of the query + h - 1][column of the key]
// r * (2h - 1) * r numbers instead of (h * r) ** 2. With keys in row-major order the bias of one query against all keys
// is one contiguous slice of it, and so is its gradient. Queries that follow each other down a column read slices that
// are r apart, which is why they are visited column by column.
#pragma once

#include "problem.h"
#include "simd.h"

namespace {

using swinv2::Group;

INLINE size_t half_expanded_size(const Group& g) { return size_t(g.r) * (2 * g.h - 1) * g.r; }

// Where the slice of the i-th query begins.
INLINE int slice_of(const Group& g, int i) {
  const int row = i % g.h, column = i / g.h;
  return (column * (2 * g.h - 1) + g.h - 1 - row) * g.r;
}

// In units of log 2: the kernels use powers of two.
constexpr double kLog2e = 1.4426950408889634;

template <class T>
void expand(const Group& g, const T* table, T* half) {
  for (int query = 0; query < g.r; query++) {
    for (int row = 0; row < 2 * g.h - 1; row++) {
      const T* from = table + g.centre + (g.h - 1 - row) * g.row_stride + g.column[query];
      for (int key = 0; key < g.r; key++) half[key] = from[-g.column[key]] * T(kLog2e);
      half += g.r;
    }
  }
}

// The gradient: adds what belongs to the same entry of the table, in a fixed order.
template <class T>
void collapse(const Group& g, const T* half, T* table) {
  for (int query = 0; query < g.r; query++) {
    for (int row = 0; row < 2 * g.h - 1; row++) {
      T* to = table + g.centre + (g.h - 1 - row) * g.row_stride + g.column[query];
      for (int key = 0; key < g.r; key++) to[-g.column[key]] += half[key];
      half += g.r;
    }
  }
}

}  // namespace
