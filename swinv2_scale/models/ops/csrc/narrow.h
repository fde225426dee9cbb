// float32 and bfloat16 in memory, float32 in vectors: loads, stores, and loops over numbers that fill no vector at last.
#pragma once

#include <type_traits>

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

// How many numbers of a vector are meant: all of them, known when this is compiled, or an int of fewer.
using Whole = std::integral_constant<int, kLanes<float>>;

// The others are zero.
template <class In, class N>
INLINE Vector<float> load_wide(const In* p, N n) {
  if constexpr (std::is_same_v<N, Whole>) {
    return load_wide(p);
  } else {
    In some[Whole::value] = {};
    __builtin_memcpy(some, p, n * sizeof(In));
    return load_wide(some);
  }
}
template <class In, class N>
INLINE void store_narrow(In* p, Vector<float> x, N n) {
  if constexpr (std::is_same_v<N, Whole>) {
    store_narrow(p, x);
  } else {
    In some[Whole::value];
    store_narrow(some, x);
    __builtin_memcpy(p, some, n * sizeof(In));
  }
}

// f(i, how many from i on), over all of `count`.
template <class F>
INLINE void for_vectors(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + Whole::value <= count; i += Whole::value) f(i, Whole{});
  if (i < count) f(i, int(count - i));
}

}  // namespace
