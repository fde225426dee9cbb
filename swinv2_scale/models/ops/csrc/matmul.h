// Small matrix products out of registers. A matrix is stored in units: the numbers that one multiply-add reads along
// the summed axis. That is one float or double, or two neighbouring bfloat16 for vdpbf16ps.
//
//   rows     [row][unit]            the operand whose numbers are broadcast
//   panels   [row / W][unit][W]     the other one where rows are scored against rows (W lanes: W rows)
//   columns  [unit][D]              the other one where rows are summed
#pragma once

#include "simd.h"

namespace {

struct BFloat16 {
  uint16_t bits;
};

INLINE float to_float(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}
INLINE BFloat16 to_bfloat16(float x) {  // to nearest, ties to even
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, quiet = bits >> 16 | 0x40;
  return BFloat16{uint16_t((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded)};
}
template <class T, class In>
INLINE T widen(In x) {
  if constexpr (sizeof(In) == 2) {
    return to_float(x);
  } else {
    return x;
  }
}
template <class In, class T>
INLINE In narrow(T x) {
  if constexpr (sizeof(In) == 2) {
    return to_bfloat16(x);
  } else {
    return x;
  }
}

// Products in the compute type itself.
template <class Number>
struct Wide {
  using T = Number;
  using Unit = Number;
  static constexpr int kPair = 1;  // numbers in a unit
  static constexpr bool kRaw = false;  // queries and keys are normalised before they are multiplied
  static constexpr bool kTiles = false;
  struct State {};  // of the processor, while such products are made
  static INLINE Vector<T> multiply_add(Unit a, Vector<Unit> b, Vector<T> c) { return a * b + c; }
  // P vectors of one row -> units along the row.
  template <int P>
  static INLINE void store_row(Unit* to, const Vector<T> (&x)[P]) {
    UNROLL for (int v = 0; v < P; v++) store(to + v * kLanes<T>, x[v]);
  }
  // kPair rows -> units across them.
  static INLINE void store_rows(Unit* to, const Vector<T>* x) { store(to, *x); }
};

#if defined(__AVX512BF16__)
// bfloat16 products, summed in float32.
struct Halves {
  using T = float;
  using Unit = uint32_t;
  static constexpr int kPair = 2;
  static constexpr bool kRaw = true;  // or as they come, without a rounding, and their products after that
  static constexpr bool kTiles = false;  // true: the products of whole blocks, see amx.h
  struct State {};
  static INLINE Vector<T> multiply_add(Unit a, Vector<Unit> b, Vector<T> c) {
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
  }
  template <int P>
  static INLINE void store_row(Unit* to, const Vector<T> (&x)[P]) {
    static_assert(P <= 2);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)x[P - 1], (__m512)x[0]);
    if constexpr (P == 2) {
      _mm512_storeu_si512(to, both);
    } else {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(both));
    }
  }
  static INLINE void store_rows(Unit* to, const Vector<T> (&x)[2]) {
    static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_loadu_si512(order), both));
  }
};
#endif

template <class T, int P>
INLINE void clear(Vector<T> (&x)[kRows][P]) {
  UNROLL for (int i = 0; i < kRows; i++) {
    UNROLL for (int v = 0; v < P; v++) x[i][v] = Vector<T>{};
  }
}
template <int P, class T>
INLINE void load_block(const T* from, int stride, Vector<T> (&x)[kRows][P]) {
  UNROLL for (int i = 0; i < kRows; i++) {
    UNROLL for (int v = 0; v < P; v++) x[i][v] = load(from + i * stride + v * kLanes<T>);
  }
}

// acc[i][v] += rows[i] . panels[v]: kRows rows against P panels.
template <class M, int P>
INLINE void score(const typename M::Unit* rows, const typename M::Unit* panels, int units,
                  Vector<typename M::T> (&acc)[kRows][P]) {
  constexpr int W = kLanes<typename M::Unit>;
  for (int d = 0; d < units; d++) {
    Vector<typename M::Unit> b[P];
    UNROLL for (int v = 0; v < P; v++) {
      b[v] = load(panels + (v * units + d) * W);
      HOLD(b[v]);
    }
    UNROLL for (int i = 0; i < kRows; i++) {
      UNROLL for (int v = 0; v < P; v++) acc[i][v] = M::multiply_add(rows[i * units + d], b[v], acc[i][v]);
    }
  }
}

// y[i] += sum over k < units of a[i * row_step + k * unit_step] * b[k], for kRows rows of C vectors.
template <class M, int C>
INLINE void accumulate_columns(typename M::T* y, const typename M::Unit* a, int row_step, int unit_step,
                               const typename M::Unit* b, int units, int dim) {
  using T = typename M::T;
  constexpr int W = kLanes<T>;
  Vector<T> acc[kRows][C];
  UNROLL for (int i = 0; i < kRows; i++) {
    UNROLL for (int v = 0; v < C; v++) acc[i][v] = load(y + i * dim + v * W);
  }
  for (int k = 0; k < units; k++) {
    Vector<typename M::Unit> bv[C];
    UNROLL for (int v = 0; v < C; v++) {
      bv[v] = load(b + k * dim + v * W);
      HOLD(bv[v]);
    }
    UNROLL for (int i = 0; i < kRows; i++) {
      const typename M::Unit s = a[i * row_step + k * unit_step];
      UNROLL for (int v = 0; v < C; v++) acc[i][v] = M::multiply_add(s, bv[v], acc[i][v]);
    }
  }
  UNROLL for (int i = 0; i < kRows; i++) {
    UNROLL for (int v = 0; v < C; v++) store(y + i * dim + v * W, acc[i][v]);
  }
}
template <class M>
INLINE void accumulate(typename M::T* y, const typename M::Unit* a, int row_step, int unit_step,
                       const typename M::Unit* b, int units, int dim) {
  constexpr int W = kLanes<typename M::T>;
  int c = 0;
  for (; c + kPanels * W <= dim; c += kPanels * W)
    accumulate_columns<M, kPanels>(y + c, a, row_step, unit_step, b + c, units, dim);
  for (; c < dim; c += W) accumulate_columns<M, 1>(y + c, a, row_step, unit_step, b + c, units, dim);
}

}  // namespace
