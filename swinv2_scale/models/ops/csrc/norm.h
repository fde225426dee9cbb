// x + share * LayerNorm(branch) of float32 and bfloat16, and its gradients: what ends both halves of a Swin V2 block.
#pragma once

#include "narrow.h"

namespace {

template <class In>
struct AddedNorm {
  const swinv2::Norm& p;
  const int64_t row;
  const float share = p.share ? p.share[row / p.rows_a_sample] : 1.0f;

  template <class T>
  INLINE T* at(T* rows) const { return rows + row * p.channels; }

  INLINE void forward() const {
    const In *branch = at(static_cast<const In*>(p.branch)), *x = at(static_cast<const In*>(p.x));
    In* out = at(static_cast<In*>(p.out));
    Vector<float> all{}, squares{};
    for_vectors(p.channels, [&](int64_t c, auto n) { all += load_wide(branch + c, n); });
    const float mean = sum<float>(all) / p.channels;
    for_vectors(p.channels, [&](int64_t c, auto n) {
      float apart[Whole::value];
      store(apart, load_wide(branch + c, n) - mean);
      const Vector<float> d = load_wide(apart, n);  // zero beyond the row
      squares += d * d;
    });
    const float rstd = 1.0f / __builtin_sqrtf(sum<float>(squares) / p.channels + p.eps);
    for_vectors(p.channels, [&](int64_t c, auto n) {
      const Vector<float> normal = (load_wide(branch + c, n) - mean) * rstd;
      const Vector<float> y = normal * load_wide(p.weight + c, n) + load_wide(p.bias + c, n);
      store_narrow(out + c, load_wide(x + c, n) + share * y, n);
    });
    p.mean[row] = mean;
    p.rstd[row] = rstd;
  }

  // The branch's gradient; those of weight and bias are added to the ones there.
  INLINE void backward(float* grad_weight, float* grad_bias) const {
    const In *branch = at(static_cast<const In*>(p.branch)), *grad = at(static_cast<const In*>(p.grad));
    In* out = at(static_cast<In*>(p.out));
    const float mean = p.mean[row], rstd = p.rstd[row];
    Vector<float> level{}, slope{};
    for_vectors(p.channels, [&](int64_t c, auto n) {
      const Vector<float> g = load_wide(grad + c, n) * share, normal = (load_wide(branch + c, n) - mean) * rstd;
      store_narrow(grad_weight + c, load_wide(grad_weight + c, n) + g * normal, n);
      store_narrow(grad_bias + c, load_wide(grad_bias + c, n) + g, n);
      const Vector<float> weighted = g * load_wide(p.weight + c, n);
      level += weighted;
      slope += weighted * normal;
    });
    const float mean_level = sum<float>(level) / p.channels, mean_slope = sum<float>(slope) / p.channels;
    for_vectors(p.channels, [&](int64_t c, auto n) {
      const Vector<float> g = load_wide(grad + c, n) * share, normal = (load_wide(branch + c, n) - mean) * rstd;
      store_narrow(out + c, (g * load_wide(p.weight + c, n) - mean_level - normal * mean_slope) * rstd, n);
    });
  }
};

template <class In>
void add_norm(const swinv2::Norm& p, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; row++) AddedNorm<In>{p, row}.forward();
}

// Adds to `sums`, (2, channels): the gradients of weight and bias.
template <class In>
void add_norm_backward(const swinv2::Norm& p, int64_t first, int64_t last, float* sums) {
  for (int64_t row = first; row < last; row++) AddedNorm<In>{p, row}.backward(sums, sums + p.channels);
}

}  // namespace
