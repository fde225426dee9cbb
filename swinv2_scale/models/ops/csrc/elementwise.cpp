// What stands around attention in a block, as torch sees it: the MLP's GELU, and LayerNorm with the sum that follows it.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "threads.h"

namespace swinv2 {
namespace {

using at::Tensor;

KernelsOfType kernels_for(const Tensor& x) {
  const auto dtype = x.scalar_type();
  TORCH_CHECK((dtype == at::kFloat || dtype == at::kBFloat16) && x.is_contiguous() && x.device().is_cpu(),
              "x must be contiguous float32 or bfloat16 on the CPU, it is ", dtype);
  return active.of[dtype == at::kFloat ? kFloat : kBFloat16];
}

// Of 32 thousand numbers at a time: run(first, count, kernels).
template <class Run>
void for_each_piece(const Tensor& x, const Run& run) {
  constexpr int64_t kPiece = 32 * 1024;
  const int64_t pieces = (x.numel() + kPiece - 1) / kPiece;
  const KernelsOfType kernels = kernels_for(x);
  for_each(pieces, threads_for(pieces), [&](int64_t i, int64_t) {
    run(i * kPiece * x.element_size(), std::min(kPiece, x.numel() - i * kPiece), kernels);
  });
}

Tensor gelu(const Tensor& x) {
  Tensor y = at::empty_like(x);
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(y.data_ptr());
  for_each_piece(x, [&](int64_t at, int64_t count, const KernelsOfType& kernels) {
    kernels.gelu(from + at, to + at, count);
  });
  return y;
}

// gelu(x); the gradient of it becomes that of x.
Tensor gelu_backward(const Tensor& x, const Tensor& grad) {
  TORCH_CHECK(grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type() && grad.is_contiguous(),
              "the gradient must be as x, ", x.scalar_type(), " ", x.sizes(), ", it is ", grad.scalar_type(), " ",
              grad.sizes());
  Tensor y = at::empty_like(x);
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char *gradient = static_cast<char*>(grad.data_ptr()), *to = static_cast<char*>(y.data_ptr());
  for_each_piece(x, [&](int64_t at, int64_t count, const KernelsOfType& kernels) {
    kernels.gelu_backward(from + at, gradient + at, to + at, count);
  });
  return y;
}

// Rows of all tensors, and how they are dealt: by shapes alone, for the order of sums decides the bits.
struct Rows {
  Norm norm{};
  int64_t rows, pieces;

  // `share`: (samples), what of the branch is added to each.
  Rows(const Tensor& branch, const std::optional<Tensor>& share) {
    TORCH_CHECK(branch.dim() >= 2 && branch.size(-1) > 0, "branch must be (samples, .., channels), it is ",
                branch.sizes());
    norm.branch = branch.const_data_ptr();
    norm.channels = static_cast<int>(branch.size(-1));
    rows = branch.numel() / norm.channels;
    norm.rows_a_sample = std::max<int64_t>(rows / std::max<int64_t>(branch.size(0), 1), 1);
    if (share) {
      check(*share, {branch.size(0)}, "share");
      norm.share = share->const_data_ptr<float>();
    }
    pieces = std::clamp<int64_t>(branch.numel() / (32 * 1024), 1, 256);
  }

  static void check(const Tensor& numbers, at::IntArrayRef sizes, const char* name) {
    TORCH_CHECK(numbers.sizes() == sizes && numbers.scalar_type() == at::kFloat && numbers.is_contiguous(), name,
                " must be contiguous float32 ", sizes, ", it is ", numbers.scalar_type(), " ", numbers.sizes());
  }

  static void check_alike(const Tensor& other, const Tensor& branch, const char* name) {
    TORCH_CHECK(other.sizes() == branch.sizes() && other.scalar_type() == branch.scalar_type() &&
                    other.is_contiguous(),
                name, " must be as branch, ", branch.scalar_type(), " ", branch.sizes(), ", it is ",
                other.scalar_type(), " ", other.sizes());
  }

  // run(piece, first row, last)
  template <class Run>
  void deal(const Run& run) const {
    for_each(pieces, threads_for(pieces), [&](int64_t i, int64_t) {
      run(i, rows * i / pieces, rows * (i + 1) / pieces);
    });
  }
};

std::tuple<Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& branch,
                                                  const std::optional<Tensor>& share, const Tensor& weight,
                                                  const Tensor& bias, double eps) {
  const KernelsOfType kernels = kernels_for(branch);
  Rows call(branch, share);
  Rows::check_alike(x, branch, "x");
  Rows::check(weight, {call.norm.channels}, "weight");
  Rows::check(bias, {call.norm.channels}, "bias");
  Tensor out = at::empty_like(branch);
  Tensor mean = at::empty({call.rows}, weight.options()), rstd = at::empty_like(mean);
  Norm& norm = call.norm;
  norm.x = x.const_data_ptr();
  norm.weight = weight.const_data_ptr<float>();
  norm.bias = bias.const_data_ptr<float>();
  norm.out = out.data_ptr();
  norm.mean = mean.data_ptr<float>();
  norm.rstd = rstd.data_ptr<float>();
  norm.eps = static_cast<float>(eps);
  call.deal([&](int64_t, int64_t first, int64_t last) { kernels.add_norm(norm, first, last); });
  return {out, mean, rstd};
}

// Of branch, weight and bias; x has grad itself.
std::tuple<Tensor, Tensor, Tensor> add_layer_norm_backward(const Tensor& grad, const Tensor& branch,
                                                           const std::optional<Tensor>& share, const Tensor& weight,
                                                           const Tensor& mean, const Tensor& rstd) {
  const KernelsOfType kernels = kernels_for(branch);
  Rows call(branch, share);
  const int64_t channels = call.norm.channels;
  Rows::check_alike(grad, branch, "grad");
  Rows::check(weight, {channels}, "weight");
  Rows::check(mean, {call.rows}, "mean");
  Rows::check(rstd, {call.rows}, "rstd");
  Tensor out = at::empty_like(branch), sums = at::zeros({call.pieces, 2, channels}, weight.options());
  Norm& norm = call.norm;
  norm.grad = grad.const_data_ptr();
  norm.weight = weight.const_data_ptr<float>();
  norm.out = out.data_ptr();
  norm.mean = mean.data_ptr<float>();
  norm.rstd = rstd.data_ptr<float>();
  float* partial = sums.data_ptr<float>();
  call.deal([&](int64_t i, int64_t first, int64_t last) {
    kernels.add_norm_backward(norm, first, last, partial + i * 2 * channels);
  });
  for (int64_t i = 1; i < call.pieces; i++)  // in their order
    for (int64_t c = 0; c < 2 * channels; c++) partial[c] += partial[i * 2 * channels + c];
  return {out, sums[0][0].clone(), sums[0][1].clone()};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(swinv2_scale, m) {
  m.def("gelu(Tensor x) -> Tensor");
  m.def("gelu_backward(Tensor x, Tensor(a!) grad) -> Tensor");
  m.def(
      "add_layer_norm(Tensor x, Tensor branch, Tensor? share, Tensor weight, Tensor bias, float eps) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "add_layer_norm_backward(Tensor grad, Tensor branch, Tensor? share, Tensor weight, Tensor mean, Tensor rstd) -> "
      "(Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(swinv2_scale, CPU, m) {
  m.impl("gelu", &gelu);
  m.impl("gelu_backward", &gelu_backward);
  m.impl("add_layer_norm", &add_layer_norm);
  m.impl("add_layer_norm_backward", &add_layer_norm_backward);
}

}  // namespace swinv2
