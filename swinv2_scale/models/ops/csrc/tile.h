// Reading a tile's tokens out of the map and writing gradients back, and where the scratch of an item lies.
#pragma once

#include "amx.h"
#include "bias.h"
#include "matmul.h"
#include "problem.h"

namespace {

using swinv2::Item;
using swinv2::Problem;

INLINE int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Hands out pieces of one block, each aligned to 64 bytes; from a block at 0 it only counts.
struct Carver {
  uintptr_t base;
  size_t used = 0;
  template <class T>
  T* take(size_t n) {
    T* p = reinterpret_cast<T*>(base + used);
    used += (n * sizeof(T) + 63) / 64 * 64;
    return p;
  }
};

// Sizes of one tile and one head, rounded up to what the registers hold. What is beyond the real ones is zero.
template <class M, int kDim>
struct Sizes {
  static constexpr int W = kLanes<typename M::T>;
  static constexpr int kKeyStep = W > kRows ? W : kRows;
  int n, keys, queries, real_dim, dim, units;
  Sizes(const Problem& p, const Group& g)
      : n(g.n), keys(round_up(g.n, kKeyStep)), queries(round_up(g.n, kRows)), real_dim(kDim ? kDim : p.dim),
        dim(kDim ? kDim : round_up(p.dim, 16)), units(dim / M::kPair) {}
};

// Where the vectors of one tile and one head are: queries, keys and values; output; logarithms of sums.
struct Place {
  int64_t qkv, token, part, out, out_token, sum;
  const int64_t* tokens = nullptr;
  Place() {}
  Place(const Problem& p, const Item& item, int64_t tile) {
    const int64_t image = tile / item.group->tiles;
    part = p.heads * p.dim;
    token = 3 * part;
    qkv = image * p.length * token + int64_t(item.head) * p.dim;
    out_token = part;
    out = image * p.length * part + int64_t(item.head) * p.dim;
    sum = (image * p.heads + item.head) * p.length;
    tokens = item.group->tokens + tile % item.group->tiles * item.group->n;
  }
};

template <class T>
INLINE T dot(const T* x, const T* y, int dim) {
  Vector<T> s{};
  for (int d = 0; d < dim; d += kLanes<T>) s += load(x + d) * load(y + d);
  return sum<T>(s);
}

template <class T>
INLINE T square_root(T x) {
  if constexpr (sizeof(T) == 4) {
    return __builtin_sqrtf(x);
  } else {
    return __builtin_sqrt(x);
  }
}

// 1 / |x|, and 0 for a zero vector: it normalises to zero and passes no gradient.
template <class T>
INLINE T reciprocal_norm(const T* x, int dim) {
  const T square = dot(x, x, dim);
  if (square > T(1e-30) && square < T(1e30)) return T(1) / square_root(square);
  // The squares of very small or large numbers may under- or overflow: first to a length near one, by powers of two.
  T largest = 0;
  for (int d = 0; d < dim; d++) largest = __builtin_fabs(x[d]) > largest ? __builtin_fabs(x[d]) : largest;
  if (largest == 0) return square == square ? T(0) : square;
  int exponent;
  __builtin_frexp(largest, &exponent);
  exponent = exponent < -100 ? -100 : exponent > 100 ? 100 : exponent;  // as `unit` of ../torch_attention.py
  T scaled = 0;
  for (int d = 0; d < dim; d++) {
    const T y = T(__builtin_ldexp(x[d], -exponent));
    scaled += y * y;
  }
  return scaled == 0 ? T(0) : T(__builtin_ldexp(1 / __builtin_sqrt(scaled), -exponent));
}

// Tokens of a tile lie 3 * N * D numbers apart: the processor doesn't foresee these reads.
constexpr int kAhead = 8;
template <class In>
INLINE void prefetch(const In* p, int dim) {
  for (int d = 0; d < dim; d += 64 / int(sizeof(In))) __builtin_prefetch(p + d);
}
// What a small tile reads is fetched while the one before it is computed.
constexpr int kSmallTile = 128 * 1024;

// Rows [first, first + count) of one operand: the order'th tokens of a tile, zeros beyond the n-th.
template <class In, class T, class S>
INLINE void read_rows(const In* from, int64_t stride, const int64_t* tokens, const int* order, int first, int count,
                      const S& size, T* rows) {
  for (int i = 0; i < count; i++) {
    T* x = rows + i * size.dim;
    int d = 0;
    if (first + i < size.n) {
      const In* p = from + tokens[order[first + i]] * stride;
      if (first + i + kAhead < size.n) prefetch(from + tokens[order[first + i + kAhead]] * stride, size.real_dim);
      for (; d < size.real_dim; d++) x[d] = widen<T>(p[d]);
    }
    for (; d < size.dim; d++) x[d] = 0;
  }
}

// Rows times their factors are of length one. Rows of numbers that come in the type they are multiplied in stay as they
// are, unless their squares could leave float32's range; the others are multiplied here, and have no factors.
template <class M, class T, class S>
INLINE void normalise_rows(T* rows, int count, const S& size, T* factors) {
  for (int i = 0; i < count; i++) {
    T* x = rows + i * size.dim;
    T factor = reciprocal_norm(x, size.dim);
    if (!M::kRaw || !((factor > T(1e-12) && factor < T(1e12)) || factor == 0)) {
      for (int d = 0; d < size.dim; d++) x[d] *= factor;
      factor = 1;
    }
    if (M::kRaw) factors[i] = factor;
  }
}

// The cosine of each pair that score() multiplied.
template <class M, int P>
INLINE void take_factors(const typename M::T* query_factors, const typename M::T* key_factors,
                         Vector<typename M::T> (&x)[kRows][P]) {
  if constexpr (M::kRaw) {
    UNROLL for (int i = 0; i < kRows; i++) {
      UNROLL for (int v = 0; v < P; v++)
        x[i][v] *= load(key_factors + v * kLanes<typename M::T>) * query_factors[i];
    }
  }
}

// Where rows are read to that will be stored as units at `to`: there, if that is the same.
template <class M>
INLINE typename M::T* staging(typename M::T* rows, typename M::Unit* to) {
  if constexpr (M::kPair == 1) {
    return to;
  } else {
    return rows;
  }
}
template <class M, class S>
INLINE void pack_rows(const typename M::T* rows, int count, const S& size, typename M::Unit* to) {
  constexpr int W = kLanes<typename M::T>, kPair = M::kPair;
  if constexpr (kPair == 1) return;
  for (int d = 0; d < count * size.dim; d += kPair * W) {
    Vector<typename M::T> x[kPair];
    UNROLL for (int v = 0; v < kPair; v++) x[v] = load(rows + d + v * W);
    M::store_row(to + d / kPair, x);
  }
}
template <class M, class S>
INLINE void pack_columns(const typename M::T* rows, int count, const S& size, typename M::Unit* to) {
  constexpr int W = kLanes<typename M::T>, kPair = M::kPair;
  if constexpr (kPair == 1) return;
  for (int i = 0; i < count; i += kPair) {
    for (int d = 0; d < size.dim; d += W) {
      Vector<typename M::T> x[kPair];
      UNROLL for (int v = 0; v < kPair; v++) x[v] = load(rows + (i + v) * size.dim + d);
      M::store_rows(to + i / kPair * size.dim + d, x);
    }
  }
}
// W rows of units -> one panel.
template <class M, class S>
INLINE void to_panel(const typename M::Unit* rows, const S& size, typename M::Unit* panel) {
  constexpr int W = kLanes<typename M::Unit>;
  const int squares = size.units / W * W;
  for (int d = 0; d < squares; d += W) transpose_square(rows + d, size.units, panel + d * W);
  for (int d = squares; d < size.units; d++)
    for (int i = 0; i < W; i++) panel[d * W + i] = rows[i * size.units + d];
}

}  // namespace
