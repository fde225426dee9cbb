// GELU (erf) of float32 and bfloat16, and its gradient, which shares all that is expensive with it.
#pragma once

#include "narrow.h"

namespace {

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

template <class In>
void gelu(const void* from, void* to, int64_t count) {
  const In* x = static_cast<const In*>(from);
  In* y = static_cast<In*>(to);
  for_vectors(count, [&](int64_t i, auto n) {
    const Vector<float> v = load_wide(x + i, n);
    store_narrow(y + i, v * normal(v).below, n);
  });
}

// y = gelu(x), and the gradient of y becomes that of x.
template <class In>
void gelu_backward(const void* from, void* gradient, void* to, int64_t count) {
  const In* x = static_cast<const In*>(from);
  In *grad = static_cast<In*>(gradient), *y = static_cast<In*>(to);
  for_vectors(count, [&](int64_t i, auto n) {
    const Vector<float> v = load_wide(x + i, n);
    const Normal share = normal(v);
    store_narrow(y + i, v * share.below, n);
    store_narrow(grad + i, load_wide(grad + i, n) * (share.below + share.slope), n);
  });
}

}  // namespace
