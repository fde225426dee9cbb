// Forward: softmax over all keys of a tile in one pass (the running reference of FlashAttention, moved rarely).
#pragma once

#include "tile.h"

namespace {

#ifndef FORWARD_QUERIES
#define FORWARD_QUERIES 48
#endif
#ifndef FORWARD_KEYS
#define FORWARD_KEYS 128
#endif
constexpr int kForwardQueries = FORWARD_QUERIES, kForwardKeys = FORWARD_KEYS;

// Weights are powers of two relative to a reference of their row, which may lag the row's maximum by this much before it
// is moved: 2**60 times 2**20 keys is far from overflow.
constexpr int kHeadroom = 60;
constexpr float kNothing = -1e30f;

template <class In, class M, int kDim>
struct Forward {
  using T = typename M::T;
  using Unit = typename M::Unit;
  using Vec = Vector<T>;
  static constexpr int W = kLanes<T>;

  const Problem& p;
  const Group& g;
  const Sizes<M, kDim> size;
  T *half, *rows, *sums, *reference, *key_factors, *query_factors, *scores;
  Unit *packed, *keys, *values, *queries, *weights;
  Vec* total;
  int* slice;
  Place next;
  T scale = 0;
  size_t bytes;

  Forward(const Problem& problem, const Group& group, char* scratch) : p(problem), g(group), size(problem, group) {
    Carver carver{reinterpret_cast<uintptr_t>(scratch)};
    half = carver.take<T>(half_expanded_size(g) + size.keys - size.n);
    rows = carver.take<T>(size_t(size.kKeyStep) * size.dim);
    packed = carver.take<Unit>(size_t(W) * size.units);
    keys = carver.take<Unit>(size_t(size.keys) * size.units);
    values = carver.take<Unit>(size_t(size.keys) / M::kPair * size.dim);
    queries = carver.take<Unit>(size_t(size.queries) * size.units);
    sums = carver.take<T>(size_t(kForwardQueries) * size.dim);
    reference = carver.take<T>(kForwardQueries);
    key_factors = carver.take<T>(M::kRaw ? size.keys : 0);
    query_factors = carver.take<T>(M::kRaw ? size.queries : 0);
    total = carver.take<Vec>(kForwardQueries);
    weights = carver.take<Unit>(kRows * kForwardKeys / M::kPair);
    scores = carver.take<T>(M::kTiles ? kRows * kForwardKeys : 0);
    slice = carver.take<int>(size.queries);
    bytes = carver.used;
  }

  void run(const Item& item) {
    for (int i = 0; i < size.queries; i++) slice[i] = i < size.n ? slice_of(g, i) : 0;
    expand(g, static_cast<const T*>(p.bias_table) + item.head * p.table_size, half);
    __builtin_memset(half + half_expanded_size(g), 0, sizeof(T) * (size.keys - size.n));
    scale = static_cast<const T*>(p.logit_scale)[item.head] * T(kLog2e);
    for (int64_t tile = item.first; tile < item.last; tile++) {
      const Place place(p, item, tile);
      next = Place(p, item, tile + 1);
      if (tile + 1 == item.last || 3 * size.n * size.dim * int(sizeof(In)) > kSmallTile) next.tokens = nullptr;
      read(place);
      for (int first = 0; first < size.queries; first += kForwardQueries) {
        const int count = size.queries - first < kForwardQueries ? size.queries - first : kForwardQueries;
        attend(first, count);
        write(place, first, count);
      }
    }
  }

  void read(const Place& place) {
    const In* qkv = static_cast<const In*>(p.qkv) + place.qkv;
    for (int j = 0; j < size.keys; j += W) {
      T* key = staging<M>(rows, packed);
      read_rows(qkv + place.part, place.token, place.tokens, g.key_place, j, W, size, key);
      normalise_rows<M>(key, W, size, key_factors + j);
      pack_rows<M>(key, W, size, packed);
      to_panel<M>(packed, size, keys + size_t(j) * size.units);
      Unit* to = values + size_t(j) / M::kPair * size.dim;
      T* value = staging<M>(rows, to);
      read_rows(qkv + 2 * place.part, place.token, place.tokens, g.key_place, j, W, size, value);
      pack_columns<M>(value, W, size, to);
    }
    for (int i = 0; i < size.queries; i += kRows) {
      Unit* to = queries + size_t(i) * size.units;
      T* query = staging<M>(rows, to);
      read_rows(qkv, place.token, place.tokens, g.query_place, i, kRows, size, query);
      normalise_rows<M>(query, kRows, size, query_factors + i);
      pack_rows<M>(query, kRows, size, to);
    }
  }

  // Tokens [first, first + kRows) of the tile that comes next.
  INLINE void prefetch_next(int first) {
    if (!next.tokens) return;
    const In* qkv = static_cast<const In*>(p.qkv) + next.qkv;
    for (int i = first; i < first + kRows && i < size.n; i++) {
      const In* at = qkv + next.tokens[g.key_place[i]] * next.token;
      for (int part = 0; part < 3; part++) prefetch(at + part * next.part, size.real_dim);
    }
  }

  // `count` queries against all keys, kRows of them at a time.
  void attend(int first, int count) {
    __builtin_memset(sums, 0, sizeof(T) * count * size.dim);
    __builtin_memset(static_cast<void*>(total), 0, sizeof(Vec) * count);
    for (int i = 0; i < count; i++) reference[i] = kNothing;
    for (int from = 0; from < size.keys; from += kForwardKeys) {
      const int to = size.keys - from < kForwardKeys ? size.keys : from + kForwardKeys;
      for (int i = 0; i < count; i += kRows) {
        if (from == 0) prefetch_next(first + i);
        if constexpr (M::kTiles)
          score_block(queries + size_t(first + i) * size.units, keys + size_t(from) * size.units, to - from, scores,
                      kForwardKeys);
        int summed = from, j = from;  // keys whose weights have gone into the sums
        for (; j + kPanels * W <= to && j + kPanels * W <= size.n; j += kPanels * W)
          weigh<kPanels, false>(first, i, from, j, summed);
        for (; j + W <= size.n && j < to; j += W) weigh<1, false>(first, i, from, j, summed);
        for (; j < to; j += W) weigh<1, true>(first, i, from, j, summed);
        sum_values(i, from, summed, to);
      }
    }
  }

  // Weights of kRows queries with P * W keys from the j-th on.
  template <int P, bool kEnds>
  INLINE void weigh(int first, int i0, int from, int j, int& summed) {
    Vec x[kRows][P];
    const int* at = slice + first + i0;
    if constexpr (M::kTiles) {
      load_block<P>(scores + j - from, kForwardKeys, x);
    } else {
      clear<T, P>(x);
      score<M, P>(queries + size_t(first + i0) * size.units, keys + size_t(j) * size.units, size.units, x);
    }
    take_factors<M, P>(query_factors + first + i0, key_factors + j, x);
    UNROLL for (int i = 0; i < kRows; i++) {
      UNROLL for (int v = 0; v < P; v++) x[i][v] = x[i][v] * scale + load(half + at[i] + j + v * W);
    }
    if constexpr (kEnds) {  // keys that only fill the last panel
      UNROLL for (int i = 0; i < kRows; i++)
        x[i][0] = lane_numbers<T>() < T(size.n - j) ? x[i][0] : splat(T(kNothing));
    }
    Vec highest = splat(T(kNothing));
    UNROLL for (int i = 0; i < kRows; i++) {
      UNROLL for (int v = 0; v < P; v++) highest = larger<T>(x[i][v] - reference[i0 + i], highest);
    }
    if (any_above(highest, T(kHeadroom))) {
      sum_values(i0, from, summed, j);
      summed = j;
      for (int i = 0; i < kRows; i++) {
        Vec top = x[i][0];
        for (int v = 1; v < P; v++) top = larger<T>(x[i][v], top);
        move_reference(i0 + i, maximum<T>(top));
      }
    }
    UNROLL for (int i = 0; i < kRows; i++) {
      UNROLL for (int v = 0; v < P; v++) {
        x[i][v] = exp2_of(x[i][v] - reference[i0 + i]);
        total[i0 + i] += x[i][v];
      }
      M::store_row(weights + (i * kForwardKeys + j - from) / M::kPair, x[i]);
    }
  }

  void move_reference(int i, T top) {
    if (!(top > reference[i] + kHeadroom)) return;
    const T factor = exp2_of(splat(reference[i] - top))[0];
    reference[i] = top;
    total[i] *= factor;
    for (int d = 0; d < size.dim; d++) sums[i * size.dim + d] *= factor;
  }

  INLINE void sum_values(int i0, int from, int begin, int end) {
    if (begin == end) return;
    accumulate<M>(sums + i0 * size.dim, weights + (begin - from) / M::kPair, kForwardKeys / M::kPair, 1,
                  values + size_t(begin) / M::kPair * size.dim, (end - begin) / M::kPair, size.dim);
  }

  void write(const Place& place, int first, int count) {
    for (int i = 0; i < count && first + i < size.n; i++) {
      const int64_t token = place.tokens[g.query_place[first + i]];
      const T all = sum<T>(total[i]), factor = 1 / all;
      In* to = static_cast<In*>(p.out) + place.out + token * place.out_token;
      for (int d = 0; d < size.real_dim; d++) to[d] = narrow<In>(sums[i * size.dim + d] * factor);
      static_cast<T*>(p.logsumexp)[place.sum + token] = reference[i] + T(__builtin_log2(all));
    }
  }
};

}  // namespace
