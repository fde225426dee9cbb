// GELU (erf) of float32 and bfloat16, and its gradient, which shares all that is expensive with it.
#pragma once

#include "matmul.h"

namespace {

typedef uint16_t HalfBits __attribute__((vector_size(kBytes / 2)));
typedef uint32_t WholeBits __attribute__((vector_size(kBytes)));

INLINE Vector<float> load_wide(const float* p) { return load(p); }
INLINE Vector<float> load_wide(const BFloat16* p) {
#if defined(__AVX512F__)
  const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Vector<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(all), 16);
#endif
  HalfBits bits;
  __builtin_memcpy(&bits, p, kBytes / 2);
  return reinterpret_cast<Vector<float>>(__builtin_convertvector(bits, WholeBits) << 16);
}
INLINE void store_narrow(float* p, Vector<float> x) { store(p, x); }
INLINE void store_narrow(BFloat16* p, Vector<float> x) {  // as to_bfloat16
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)x));
  return;
#endif
  const WholeBits bits = reinterpret_cast<WholeBits>(x);
  const WholeBits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, quiet = bits >> 16 | 0x40;
  const HalfBits half = __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded, HalfBits);
  __builtin_memcpy(p, &half, kBytes / 2);
}

struct Normal {
  Vector<float> below, slope;  // the share of the normal distribution below x; x times its density there
};

INLINE Normal normal(Vector<float> x) {
  // The share beyond |x| is exp(-x^2 / 2) times a smooth function: minimax in t, weighted by the square root of the
  // former; absolute error of the share 1.4e-8, with roundings 1.4e-7.
  constexpr float c[] = {0.11680974f, 0.065743916f, 0.27313331f, -0.24204685f, 0.39287812f, -0.10651825f};
  const Vector<float> zero{}, far = splat(16.0f);
  Vector<float> a = x < zero ? -x : x;
  a = a > far ? far : a;  // so that squares stay finite; not a number stays so
  const Vector<float> t = 1.0f / (a * 0.28f + 1.0f), bell = exp2_of(a * a * -0.72134752f);
  Vector<float> p = t * c[5] + c[4];
  UNROLL for (int k = 3; k >= 0; k--) p = p * t + c[k];
  const Vector<float> beyond = a < far ? bell * (p * t) : zero;
  return {x > zero ? 1.0f - beyond : beyond, (x > zero ? a : -a) * bell * 0.39894228f};
}

// The n numbers at p, n at most what a vector holds; the others are zero.
template <class In>
INLINE Vector<float> load_some(const In* p, int n) {
  In some[kLanes<float>] = {};
  __builtin_memcpy(some, p, n * sizeof(In));
  return load_wide(some);
}
template <class In>
INLINE void store_some(In* p, Vector<float> x, int n) {
  In some[kLanes<float>];
  store_narrow(some, x);
  __builtin_memcpy(p, some, n * sizeof(In));
}

template <class In>
void gelu(const void* from, void* to, int64_t count) {
  constexpr int W = kLanes<float>;
  const In* x = static_cast<const In*>(from);
  In* y = static_cast<In*>(to);
  int64_t i = 0;
  for (; i + W <= count; i += W) {
    const Vector<float> v = load_wide(x + i);
    store_narrow(y + i, v * normal(v).below);
  }
  if (i < count) {
    const Vector<float> v = load_some(x + i, int(count - i));
    store_some(y + i, v * normal(v).below, int(count - i));
  }
}

// y = gelu(x), and the gradient of y becomes that of x.
template <class In>
void gelu_backward(const void* from, void* gradient, void* to, int64_t count) {
  constexpr int W = kLanes<float>;
  const In* x = static_cast<const In*>(from);
  In *grad = static_cast<In*>(gradient), *y = static_cast<In*>(to);
  int64_t i = 0;
  for (; i + W <= count; i += W) {
    const Vector<float> v = load_wide(x + i);
    const Normal n = normal(v);
    store_narrow(y + i, v * n.below);
    store_narrow(grad + i, load_wide(grad + i) * (n.below + n.slope));
  }
  if (i < count) {
    const int rest = int(count - i);
    const Vector<float> v = load_some(x + i, rest);
    const Normal n = normal(v);
    store_some(y + i, v * n.below, rest);
    store_some(grad + i, load_some(grad + i, rest) * (n.below + n.slope), rest);
  }
}

}  // namespace
