// Vectors of one instruction set in GCC's and clang's vector extension; intrinsics where there is no other word for it.
// Everything in an unnamed namespace: these functions are compiled once for each instruction set, and a linker that
// merged them would put AVX-512 code into the portable kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64, kRows = 8;
#elif defined(__AVX2__)
constexpr int kBytes = 32, kRows = 4;
#else
constexpr int kBytes = 16, kRows = 4;
#endif
constexpr int kPanels = 2;  // kRows x kPanels accumulators, the operands beside them: what the registers hold

// Keeps an operand in a register. GCC 12 otherwise reads it again for every multiplication: x1.5 slower.
#if defined(__AVX512F__)
#define HOLD(x) asm("" : "+v"(x))
#elif defined(__x86_64__)
#define HOLD(x) asm("" : "+x"(x))
#else
#define HOLD(x)
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = kBytes / int(sizeof(T));

template <class T>
INLINE Vector<T> load(const T* p) {
  Vector<T> v;
  __builtin_memcpy(&v, p, kBytes);
  return v;
}
template <class T>
INLINE void store(T* p, Vector<T> v) {
  __builtin_memcpy(p, &v, kBytes);
}
template <class T>
INLINE Vector<T> splat(T x) {
  return x - Vector<T>{};
}
template <class T>
INLINE Vector<T> larger(Vector<T> a, Vector<T> b) {
  return a > b ? a : b;  // b where one is not a number
}

template <class T, int kSize, class F>
INLINE T fold(const T* p, F f) {  // halves, in a fixed order
  typedef T Half __attribute__((vector_size(kSize / 2)));
  Half a, b;
  __builtin_memcpy(&a, p, kSize / 2);
  __builtin_memcpy(&b, reinterpret_cast<const char*>(p) + kSize / 2, kSize / 2);
  Half c = f(a, b);
  if constexpr (kSize / 2 == sizeof(T)) {
    return c[0];
  } else {
    return fold<T, kSize / 2>(reinterpret_cast<const T*>(&c), f);
  }
}
template <class T>
INLINE T sum(Vector<T> v) {
  return fold<T, kBytes>(reinterpret_cast<const T*>(&v), [](auto a, auto b) { return a + b; });
}
template <class T>
INLINE T maximum(Vector<T> v) {
  return fold<T, kBytes>(reinterpret_cast<const T*>(&v), [](auto a, auto b) { return a > b ? a : b; });
}
template <class T>
INLINE bool any_above(Vector<T> v, T limit) {
  return maximum<T>(v) > limit;
}
template <class T>
INLINE Vector<T> lane_numbers() {
  Vector<T> v{};
  for (int i = 0; i < kLanes<T>; i++) v[i] = T(i);
  return v;
}

// 2 ** x. Not a number stays so; what is below the smallest normal number becomes about that.
INLINE Vector<float> exp2_of(Vector<float> x) {
  // Minimax on [-1/2, 1/2] with p(0) = 1: relative error 9e-8, with its own rounding 1.6e-7.
  constexpr float c[] = {1.0f, 0.693147004f, 0.240222424f, 0.0555073358f, 0.00967151299f, 0.00132647273f};
  const Vector<float> low = splat(-126.0f);
  x = low > x ? low : x;
#if defined(__AVX512F__)
  const Vector<float> whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vector<float> r = x - whole;
#else
  const Vector<float> shifted = x + 12582912.0f, r = x - (shifted - 12582912.0f);  // 1.5 * 2**23: rounds to an integer
#endif
  Vector<float> p = r * c[5] + c[4];
  p = p * r + c[3];
  p = p * r + c[2];
  p = p * r + c[1];
  p = p * r + c[0];
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, whole);
#else
  typedef int32_t Bits __attribute__((vector_size(kBytes)));
  return reinterpret_cast<Vector<float>>(reinterpret_cast<Bits>(p) + (reinterpret_cast<Bits>(shifted) << 23));
#endif
}

INLINE Vector<double> exp2_of(Vector<double> x) {
  // log(2)**k / k!; the first term left out is 2e-17 of the sum.
  constexpr double c[] = {1.0, 0.6931471805599453, 0.2402265069591007, 0.055504108664821576, 0.009618129107628477, 0.0013333558146428441, 0.00015403530393381606, 1.5252733804059838e-05, 1.3215486790144305e-06, 1.0178086009239696e-07, 7.054911620801121e-09, 4.44553827187081e-10, 2.5678435993488196e-11, 1.3691488853904124e-12};
  typedef int64_t Bits __attribute__((vector_size(kBytes)));
  const Vector<double> low = splat(-1022.0);
  x = low > x ? low : x;
  const Vector<double> shifted = x + 6755399441055744.0, r = x - (shifted - 6755399441055744.0);  // 1.5 * 2**52
  Vector<double> p = splat(c[13]);
  UNROLL for (int k = 12; k >= 0; k--) p = p * r + c[k];
  return reinterpret_cast<Vector<double>>(reinterpret_cast<Bits>(p) + (reinterpret_cast<Bits>(shifted) << 52));
}

// Picks lanes of two vectors, as one: a's are the first.
template <class V, class Lane, Lane... lane>
INLINE V pick(V a, V b, std::integer_sequence<Lane, lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, lane...);
#else
  typedef Lane Lanes __attribute__((vector_size(sizeof(V))));
  return __builtin_shuffle(a, b, Lanes{lane...});
#endif
}
// a[0] b[0] a[1] b[1] .. from the first-th lane on, half a vector of each.
template <int kFirst, class V, class Lane, Lane... lane>
INLINE V zip(V a, V b, std::integer_sequence<Lane, lane...>) {
  return pick(a, b, std::integer_sequence<Lane, (kFirst + lane / 2 + lane % 2 * Lane(sizeof...(lane)))...>{});
}
template <int kSize>
struct LaneOf {
  using type = int32_t;
};
template <>
struct LaneOf<8> {
  using type = int64_t;
};

// Transposes a square of lanes: rows[i][d] of p[i * stride + d] to out[d * lanes + i].
template <class T>
INLINE void transpose_square(const T* p, int stride, T* out) {
  constexpr int W = kLanes<T>;
  constexpr auto all = std::make_integer_sequence<typename LaneOf<sizeof(T)>::type, W>{};
  Vector<T> a[W], b[W];
  UNROLL for (int i = 0; i < W; i++) a[i] = load(p + i * stride);
  UNROLL for (int step = 1; step < W; step *= 2) {
    UNROLL for (int i = 0; i < W / 2; i++) {
      b[2 * i] = zip<0>(a[i], a[i + W / 2], all);
      b[2 * i + 1] = zip<W / 2>(a[i], a[i + W / 2], all);
    }
    UNROLL for (int i = 0; i < W; i++) a[i] = b[i];
  }
  UNROLL for (int d = 0; d < W; d++) store(out + d * W, a[d]);
}

}  // namespace
