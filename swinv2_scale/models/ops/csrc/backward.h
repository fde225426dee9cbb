// Backward: scores are computed again from the saved logarithms of sums; gradients of queries, keys, values, the
// half-expanded bias and the scale come out of the same pass over blocks of queries x keys.
#pragma once

#include "tile.h"

namespace {

#ifndef BACKWARD_QUERIES
#define BACKWARD_QUERIES 48
#endif
#ifndef BACKWARD_KEYS
#define BACKWARD_KEYS 64
#endif
#ifndef BACKWARD_SPAN
#define BACKWARD_SPAN 512
#endif
// A block; and keys whose panels, rows and gradients stay in the second-level cache while all queries go by.
constexpr int kBackwardQueries = BACKWARD_QUERIES, kBackwardKeys = BACKWARD_KEYS, kBackwardSpan = BACKWARD_SPAN;

template <class In, class M, int kDim>
struct Backward {
  using T = typename M::T;
  using Unit = typename M::Unit;
  using Vec = Vector<T>;
  static constexpr int W = kLanes<T>;
  // Of a block; what fills its last tile has no weight.
  static constexpr int kQueries = M::kTiles ? 64 : kBackwardQueries, kStep = M::kTiles ? 32 : kRows;

  const Problem& p;
  const Group& g;
  const Sizes<M, kDim> size;
  const int query_room = round_up(size.queries, kStep);
  T *half, *grad_half, *rows, *key_grads, *value_grads, *query_grads, *logsumexp, *delta, *key_factors, *query_factors;
  Unit *packed, *key_panels, *value_panels, *key_columns, *query_rows, *query_columns, *grad_rows, *grad_columns;
  Unit *weights, *scores, *score_rows;  // of one block: P and dS across queries, and dS along keys
  T *cosines, *products;  // of kRows queries with a block's keys: q . k and dO . v
  Vec *row_sum, *row_cosine, *row_scale;
  int* slice;
  Place next;
  size_t bytes;
  T scale = 0;
  double grad_scale = 0;

  Backward(const Problem& problem, const Group& group, char* scratch) : p(problem), g(group), size(problem, group) {
    Carver carver{reinterpret_cast<uintptr_t>(scratch)};
    const size_t keys = size.keys, queries = size.queries, pair = M::kPair;
    half = carver.take<T>(half_expanded_size(g) + size.keys - size.n);
    grad_half = carver.take<T>(half_expanded_size(g) + size.keys - size.n);
    rows = carver.take<T>(size_t(kRows > W ? kRows : W) * size.dim);
    packed = carver.take<Unit>(size_t(W) * size.units);
    key_panels = carver.take<Unit>(keys * size.units);
    value_panels = carver.take<Unit>(keys * size.units);
    key_columns = carver.take<Unit>(keys / pair * size.dim);
    query_rows = carver.take<Unit>(queries * size.units);
    grad_rows = carver.take<Unit>(queries * size.units);
    query_columns = pair == 1 ? query_rows : carver.take<Unit>(query_room / pair * size.dim);
    grad_columns = pair == 1 ? grad_rows : carver.take<Unit>(query_room / pair * size.dim);
    key_grads = carver.take<T>(keys * size.dim);
    value_grads = carver.take<T>(keys * size.dim);
    query_grads = carver.take<T>(queries * size.dim);
    logsumexp = carver.take<T>(queries);
    delta = carver.take<T>(queries);
    weights = carver.take<Unit>(kQueries / pair * kBackwardKeys);
    scores = carver.take<Unit>(kQueries / pair * kBackwardKeys);
    score_rows = pair == 1 ? scores : carver.take<Unit>(kQueries * kBackwardKeys / pair);
    cosines = carver.take<T>(M::kTiles ? kRows * kBackwardKeys : 0);
    products = carver.take<T>(M::kTiles ? kRows * kBackwardKeys : 0);
    row_sum = carver.take<Vec>(queries);
    row_cosine = carver.take<Vec>(queries);
    row_scale = carver.take<Vec>(M::kRaw ? queries : 0);
    key_factors = carver.take<T>(M::kRaw ? keys : 0);
    query_factors = carver.take<T>(M::kRaw ? queries : 0);
    slice = carver.take<int>(queries);
    bytes = carver.used;
  }

  void run(const Item& item, int64_t index) {
    for (int i = 0; i < size.queries; i++) slice[i] = i < size.n ? slice_of(g, i) : 0;
    expand(g, static_cast<const T*>(p.bias_table) + item.head * p.table_size, half);
    __builtin_memset(half + half_expanded_size(g), 0, sizeof(T) * (size.keys - size.n));
    __builtin_memset(grad_half, 0, sizeof(T) * (half_expanded_size(g) + size.keys - size.n));
    scale = static_cast<const T*>(p.logit_scale)[item.head];
    for (int64_t tile = item.first; tile < item.last; tile++) {
      const Place place(p, item, tile);
      next = Place(p, item, tile + 1);
      if (tile + 1 == item.last || 5 * size.n * size.dim * int(sizeof(In)) > kSmallTile) next.tokens = nullptr;
      read_keys(place);
      read_queries(place);
      __builtin_memset(key_grads, 0, sizeof(T) * size.keys * size.dim);
      __builtin_memset(value_grads, 0, sizeof(T) * size.keys * size.dim);
      __builtin_memset(query_grads, 0, sizeof(T) * size.queries * size.dim);
      for (int span = 0; span < size.keys; span += kBackwardSpan) {
        const int end = size.keys - span < kBackwardSpan ? size.keys : span + kBackwardSpan;
        for (int first = 0; first < size.queries; first += kQueries)
          for (int from = span; from < end; from += kBackwardKeys)
            block(first, size.queries - first < kQueries ? size.queries : first + kQueries, from,
                  end - from < kBackwardKeys ? end : from + kBackwardKeys);
      }
      if constexpr (M::kTiles) {
        to_rows(key_grads, size.keys);
        to_rows(value_grads, size.keys);
      }
      if (size.n == 1) forget_scores();
      write_queries(place);
      write_keys(place);
    }
    static_cast<double*>(p.grad_scale)[index] = grad_scale;
    collapse(g, grad_half, static_cast<T*>(p.grad_table) + index * p.table_size);
  }

  void read_keys(const Place& place) {
    const In* keys = static_cast<const In*>(p.qkv) + place.qkv + place.part;
    for (int j = 0; j < size.keys; j += W) {
      Unit* columns = key_columns + size_t(j) / M::kPair * size.dim;
      T* key = staging<M>(rows, columns);
      read_rows(keys, place.token, place.tokens, g.key_place, j, W, size, key);
      normalise_rows<M>(key, W, size, key_factors + j);
      pack_columns<M>(key, W, size, columns);
      pack_rows<M>(key, W, size, packed);
      to_panel<M>(M::kPair == 1 ? columns : packed, size, key_panels + size_t(j) * size.units);
      T* value = staging<M>(rows, packed);
      read_rows(keys + place.part, place.token, place.tokens, g.key_place, j, W, size, value);
      pack_rows<M>(value, W, size, packed);
      to_panel<M>(packed, size, value_panels + size_t(j) * size.units);
    }
  }

  void read_queries(const Place& place) {
    const In* queries = static_cast<const In*>(p.qkv) + place.qkv;
    const In* grad_out = static_cast<const In*>(p.grad_out) + place.out;
    const In* out = static_cast<const In*>(p.out) + place.out;
    for (int i = 0; i < size.queries; i += kRows) {
      const size_t at = size_t(i) * size.units;
      T* query = staging<M>(rows, query_rows + at);
      read_rows(queries, place.token, place.tokens, g.query_place, i, kRows, size, query);
      normalise_rows<M>(query, kRows, size, query_factors + i);
      pack_rows<M>(query, kRows, size, query_rows + at);
      pack_columns<M>(query, kRows, size, query_columns + at);
      T* grad = staging<M>(rows, grad_rows + at);
      read_rows(grad_out, place.out_token, place.tokens, g.query_place, i, kRows, size, grad);
      pack_rows<M>(grad, kRows, size, grad_rows + at);
      pack_columns<M>(grad, kRows, size, grad_columns + at);
      read_rows(out, place.out_token, place.tokens, g.query_place, i, kRows, size, query_grads);
      for (int k = 0; k < kRows; k++) {
        const bool is_real = i + k < size.n;
        delta[i + k] = dot(grad + k * size.dim, query_grads + k * size.dim, size.dim);
        // A query that only fills the last rows weighs nothing.
        logsumexp[i + k] =
            is_real ? static_cast<const T*>(p.logsumexp)[place.sum + place.tokens[g.query_place[i + k]]] : T(1e4);
      }
    }
    if constexpr (M::kTiles) {
      const size_t end = size_t(size.queries) * size.units, rest = size_t(query_room) * size.units - end;
      for (Unit* columns : {query_columns, grad_columns}) {
        __builtin_memset(columns + end, 0, sizeof(Unit) * rest);
        to_left_tiles(columns, query_room / M::kPair);
      }
    }
    __builtin_memset(static_cast<void*>(row_sum), 0, sizeof(Vec) * size.queries);
    __builtin_memset(static_cast<void*>(row_cosine), 0, sizeof(Vec) * size.queries);
    if (M::kRaw) __builtin_memset(static_cast<void*>(row_scale), 0, sizeof(Vec) * size.queries);
  }

  // Tokens [first, first + kRows) of the tile that comes next.
  INLINE void prefetch_next(int first) {
    if (!next.tokens) return;
    const In* qkv = static_cast<const In*>(p.qkv) + next.qkv;
    for (int i = first; i < first + kRows && i < size.n; i++) {
      const int64_t token = next.tokens[g.key_place[i]];
      for (int part = 0; part < 3; part++) prefetch(qkv + token * next.token + part * next.part, size.real_dim);
      prefetch(static_cast<const In*>(p.grad_out) + next.out + token * next.out_token, size.real_dim);
      prefetch(static_cast<const In*>(p.out) + next.out + token * next.out_token, size.real_dim);
    }
  }

  // Queries [first, last) against keys [from, to).
  void block(int first, int last, int from, int to) {
    for (int i = first; i < last; i += kRows) {
      if (from == 0) prefetch_next(i);
      if constexpr (M::kTiles) {
        const size_t row = size_t(i) * size.units, panel = size_t(from) * size.units;
        score_block(query_rows + row, key_panels + panel, to - from, cosines, kBackwardKeys);
        score_block(grad_rows + row, value_panels + panel, to - from, products, kBackwardKeys);
      }
      int j = from;
      for (; j + kPanels * W <= to && j + kPanels * W <= size.n; j += kPanels * W)
        differentiate<kPanels, false>(first, i, from, j);
      for (; j + W <= size.n && j < to; j += W) differentiate<1, false>(first, i, from, j);
      for (; j < to; j += W) differentiate<1, true>(first, i, from, j);
      accumulate<M>(query_grads + size_t(i) * size.dim, score_rows + (i - first) * kBackwardKeys / M::kPair,
                    kBackwardKeys / M::kPair, 1, key_columns + size_t(from) / M::kPair * size.dim,
                    (to - from) / M::kPair, size.dim);
    }
    const int units = (last - first) / M::kPair;
    const size_t at = size_t(first) / M::kPair * size.dim;
    if constexpr (M::kTiles) {
      const int room = round_up(units, kStep / M::kPair), keys = to - from;
      for (Unit* each : {weights, scores})
        __builtin_memset(each + units * kBackwardKeys, 0, sizeof(Unit) * (room - units) * kBackwardKeys);
      const size_t grads = size_t(from) * size.dim;
      accumulate_across(key_grads + grads, scores, kBackwardKeys, query_columns + at, room, keys);
      accumulate_across(value_grads + grads, weights, kBackwardKeys, grad_columns + at, room, keys);
      return;
    }
    for (int j = from; j < to; j += kRows) {
      accumulate<M>(key_grads + size_t(j) * size.dim, scores + j - from, 1, kBackwardKeys, query_columns + at, units,
                    size.dim);
      accumulate<M>(value_grads + size_t(j) * size.dim, weights + j - from, 1, kBackwardKeys, grad_columns + at, units,
                    size.dim);
    }
  }

  // P and dS of kRows queries with P * W keys from the j-th on, and what they add to the bias's gradient.
  template <int P, bool kEnds>
  INLINE void differentiate(int first, int i0, int from, int j) {
    Vec x[kRows][P], weight[kRows][P], cosine[kRows][P];
    const T scale_log2 = scale * T(kLog2e);
    const int* at = slice + i0;
    if constexpr (M::kTiles) {
      load_block<P>(cosines + j - from, kBackwardKeys, cosine);
    } else {
      clear<T, P>(cosine);
      score<M, P>(query_rows + size_t(i0) * size.units, key_panels + size_t(j) * size.units, size.units, cosine);
    }
    take_factors<M, P>(query_factors + i0, key_factors + j, cosine);
    UNROLL for (int i = 0; i < kRows; i++) {
      UNROLL for (int v = 0; v < P; v++) {
        const Vec bias = load(half + at[i] + j + v * W) - logsumexp[i0 + i];
        weight[i][v] = exp2_of(cosine[i][v] * scale_log2 + bias);
        if constexpr (kEnds) weight[i][v] = lane_numbers<T>() < T(size.n - j) ? weight[i][v] : Vec{};
        row_cosine[i0 + i] += weight[i][v] * cosine[i][v];
      }
    }
    store_block<P>(weights, i0 - first, j - from, weight);
    UNROLL for (int i = 0; i < kRows; i++) {
      UNROLL for (int v = 0; v < P; v++) x[i][v] = splat(-delta[i0 + i]);
    }
    if constexpr (M::kTiles) {
      UNROLL for (int i = 0; i < kRows; i++) {
        UNROLL for (int v = 0; v < P; v++) x[i][v] += load(products + i * kBackwardKeys + j - from + v * W);
      }
    } else {
      score<M, P>(grad_rows + size_t(i0) * size.units, value_panels + size_t(j) * size.units, size.units, x);
    }
    UNROLL for (int i = 0; i < kRows; i++) {
      UNROLL for (int v = 0; v < P; v++) {
        x[i][v] *= weight[i][v];
        row_sum[i0 + i] += x[i][v];
        if constexpr (M::kRaw) row_scale[i0 + i] += x[i][v] * cosine[i][v];
        T* to = grad_half + at[i] + j + v * W;
        store(to, load(to) + x[i][v]);
      }
    }
    if constexpr (M::kRaw) {
      // Each product takes the factor of what it is summed over.
      Vec by_key[kRows][P];
      UNROLL for (int i = 0; i < kRows; i++) {
        UNROLL for (int v = 0; v < P; v++) {
          by_key[i][v] = x[i][v] * load(key_factors + j + v * W);
          x[i][v] *= query_factors[i0 + i];
        }
        M::store_row(score_rows + ((i0 - first + i) * kBackwardKeys + j - from) / M::kPair, by_key[i]);
      }
    }
    store_block<P>(scores, i0 - first, j - from, x);
  }

  template <int P>
  INLINE void store_block(Unit* block, int i0, int j, const Vec (&x)[kRows][P]) {
    UNROLL for (int i = 0; i < kRows; i += M::kPair) {
      UNROLL for (int v = 0; v < P; v++) {
        Vec pair[M::kPair];
        UNROLL for (int k = 0; k < M::kPair; k++) pair[k] = x[i + k][v];
        M::store_rows(block + (i0 + i) / M::kPair * kBackwardKeys + j + v * W, pair);
      }
    }
  }

  // A token alone has all the weight whatever it scores: what is there is rounding, where nothing should be.
  void forget_scores() {
    __builtin_memset(query_grads, 0, sizeof(T) * size.queries * size.dim);
    __builtin_memset(key_grads, 0, sizeof(T) * size.keys * size.dim);
    __builtin_memset(grad_half, 0, sizeof(T) * (half_expanded_size(g) + size.keys - size.n));
    __builtin_memset(static_cast<void*>(row_sum), 0, sizeof(Vec) * size.queries);
    if (M::kRaw) __builtin_memset(static_cast<void*>(row_scale), 0, sizeof(Vec) * size.queries);
  }

  // x^ = x / |x|, so the gradient loses its part along x^: dx = (g - x^ (x^ . g)) / |x|. Returns x^ . g.
  INLINE T write_gradient(const T* x, const T* g_, T factor, In* to) {
    const T norm = reciprocal_norm(x, size.dim);
    const T along = dot(x, g_, size.dim) * norm;
    for (int d = 0; d < size.real_dim; d++) to[d] = narrow<In>(norm * factor * (g_[d] - x[d] * norm * along));
    return along;
  }

  void write_queries(const Place& place) {
    const In* queries = static_cast<const In*>(p.qkv) + place.qkv;
    for (int i = 0; i < size.n; i++) {
      const int64_t at = place.tokens[g.query_place[i]] * place.token;
      read_rows(queries, place.token, place.tokens, g.query_place, i, 1, size, rows);
      double along = write_gradient(rows, query_grads + size_t(i) * size.dim, scale,
                                    static_cast<In*>(p.grad_qkv) + place.qkv + at);
      if constexpr (M::kRaw) along = sum<T>(row_scale[i]);  // of numbers that were not rounded
      // The scale's gradient is the sum of dS * cos, but delta = grad_out . out is off by the rounding of `out`, and that
      // by up to a fifth in bfloat16. Rows of dS sum to zero: what is left is that error, times P.
      grad_scale += along - double(sum<T>(row_sum[i])) * sum<T>(row_cosine[i]);
    }
  }

  void write_keys(const Place& place) {
    const In* keys = static_cast<const In*>(p.qkv) + place.qkv + place.part;
    for (int j = 0; j < size.n; j++) {
      read_rows(keys, place.token, place.tokens, g.key_place, j, 1, size, rows);
      In* to = static_cast<In*>(p.grad_qkv) + place.qkv + place.tokens[g.key_place[j]] * place.token + place.part;
      write_gradient(rows, key_grads + size_t(j) * size.dim, scale, to);
      for (int d = 0; d < size.real_dim; d++) to[place.part + d] = narrow<In>(value_grads[size_t(j) * size.dim + d]);
    }
  }
};

}  // namespace
