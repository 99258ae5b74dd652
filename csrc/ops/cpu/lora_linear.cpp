#include "ops/lora_linear.h"

#include <algorithm>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "check.h"
#include "ops/cpu/adapted_layer.h"
#include "ops/cpu/chunks.h"
#include "ops/cpu/low_rank.h"
#include "ops/cpu/pieces.h"
#include "ops/rows.h"

namespace gauge_ext {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> forward_layer(const Tensor& x_any,
                                         const Tensor& weight,
                                         const OptionalTensor& bias,
                                         const Tensor& lora_A,
                                         const Tensor& lora_B,
                                         double scaling,
                                         double dropout_p,
                                         const OptionalTensor& seed,
                                         bool wants_hidden) {
  const auto n = check_lora_linear(x_any, weight, bias, lora_A, lora_B, dropout_p, seed);
  const Dropout dropout = make_dropout(dropout_p, seed);
  return dispatch_dtype(x_any, [&](auto tag) -> std::tuple<Tensor, Tensor> {
    using scalar_t = decltype(tag);
    using acc_t = typename AccOf<scalar_t>::type;
    const Tensor x = x_any.contiguous();
    const Tensor y = at::empty(output_shape(x, n.out_features), x.options());
    Tensor hidden;
    if (wants_hidden) {
      hidden = at::empty({n.rows, n.rank}, x.options().dtype(acc_dtype<scalar_t>()));
    }
    AdaptedLayer<scalar_t> layer(n, weight, bias, lora_A, lora_B, scaling, dropout);
    Buffer<acc_t> x_copy, y_copy;
    for_chunks<scalar_t>(n.rows, [&](int64_t first, int64_t rows) {
      const acc_t* from = wide_rows<scalar_t>(x, first, rows, n.in_features, x_copy);
      acc_t* h = wants_hidden ? mutable_data_of<acc_t>(hidden) + first * n.rank : nullptr;
      write_rows<scalar_t>(y, first, rows, n.out_features, y_copy,
                           [&](acc_t* to) { layer.forward(from, first, rows, h, to); });
    });
    return {y, hidden};
  });
}

std::tuple<Tensor, Tensor> forward(const Tensor& x,
                                   const Tensor& weight,
                                   const OptionalTensor& bias,
                                   const Tensor& lora_A,
                                   const Tensor& lora_B,
                                   double scaling,
                                   double dropout_p,
                                   const OptionalTensor& seed) {
  return forward_layer(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, true);
}

Tensor lora_linear(const Tensor& x,
                   const Tensor& weight,
                   const OptionalTensor& bias,
                   const Tensor& lora_A,
                   const Tensor& lora_B,
                   double scaling,
                   double dropout_p,
                   const OptionalTensor& seed) {
  return std::get<0>(
      forward_layer(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, false));
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_any,
                                            const Tensor& x_any,
                                            const Tensor& weight,
                                            const Tensor& lora_A,
                                            const Tensor& lora_B,
                                            const Tensor& hidden_any,
                                            double scaling,
                                            double dropout_p,
                                            const OptionalTensor& seed,
                                            bool needs_x,
                                            bool needs_A,
                                            bool needs_B) {
  const auto n = check_lora_linear(x_any, weight, std::nullopt, lora_A, lora_B, dropout_p, seed);
  check_grad(grad_any, "grad", x_any, n.rows, n.out_features);
  check_matrix(hidden_any, "hidden", "[N, r]", n.rows, n.rank);
  const Dropout dropout = make_dropout(dropout_p, seed);
  return dispatch_dtype(x_any, [&](auto tag) -> std::tuple<Tensor, Tensor, Tensor> {
    using scalar_t = decltype(tag);
    using acc_t = typename AccOf<scalar_t>::type;
    const Tensor x = x_any.contiguous(), grad = grad_any.contiguous();
    const Tensor hidden = hidden_any.to(acc_dtype<scalar_t>()).contiguous();
    const auto none = [](const Tensor& like) { return at::empty({0}, like.options()); };
    const Tensor grad_x = needs_x ? at::empty(x.sizes(), x.options()) : none(x);
    AdaptedLayer<scalar_t> layer(n, weight, std::nullopt, lora_A, lora_B, scaling, dropout);
    const auto sums = layer.sums(n.rows, needs_x, needs_A, needs_B);
    Buffer<acc_t> x_copy, grad_copy, grad_x_copy;
    for_chunks<scalar_t>(n.rows, [&](int64_t first, int64_t rows) {
      const acc_t* g = wide_rows<scalar_t>(grad, first, rows, n.out_features, grad_copy);
      const acc_t* from = wide_rows<scalar_t>(x, first, rows, n.in_features, x_copy);
      const acc_t* h = data_of<acc_t>(hidden) + first * n.rank;
      const auto run = [&](acc_t* to) {
        layer.backward(g, from, first, rows, h, sums, to, /*add=*/false);
      };
      if (needs_x) {
        write_rows<scalar_t>(grad_x, first, rows, n.in_features, grad_x_copy, run);
      } else {
        run(nullptr);
      }
    });
    return {grad_x, needs_A ? layer.grad_A(sums) : none(lora_A),
            needs_B ? layer.grad_B(sums) : none(lora_B)};
  });
}

Tensor dropout_mask(const Tensor& x, double dropout_p, const Tensor& seed) {
  TORCH_CHECK(x.dim() >= 1, "x must have at least one dimension, got ", x.sizes());
  const int64_t columns = x.size(-1);
  const int64_t rows = x.numel() / std::max<int64_t>(columns, 1);
  const Dropout dropout = make_dropout(dropout_p, seed);
  const Tensor mask = at::empty(x.sizes(), x.options().dtype(at::kDouble));
  double* data = mask.mutable_data_ptr<double>();
  const auto& kernels = low_rank_kernels<double>();
  Pieces(rows, columns).run([&](int64_t, int64_t first, int64_t count) {
    if (dropout.active()) {
      kernels.mask(dropout, first, count, columns, data + first * columns);
    } else {
      std::fill(data + first * columns, data + (first + count) * columns, 1.0);
    }
  });
  return mask.to(x.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(gauge_ext, CPU, m) {
  m.impl("lora_linear", &lora_linear);
  m.impl("lora_linear_forward", &forward);
  m.impl("lora_linear_backward", &backward);
  m.impl("dropout_mask", &dropout_mask);
}

}  // namespace gauge_ext
