// lora_linear on CUDA tensors. The large products are torch's; the skinny ones and what goes with
// them, dropout and the sums over rows, are the kernels of low_rank.h. Nothing here waits for the
// device, so that every call can be captured into a graph.

#include "ops/lora_linear.h"

#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "ops/cuda/low_rank_call.h"
#include "ops/rows.h"

namespace gauge_ext::cuda {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The low-rank part is written first, with the bias, and torch's product added onto it: one pass
// over (N, out) less than the other way round.
std::tuple<Tensor, Tensor> forward(const Tensor& x,
                                   const Tensor& weight,
                                   const OptionalTensor& bias,
                                   const Tensor& lora_A,
                                   const Tensor& lora_B,
                                   double scaling,
                                   double dropout_p,
                                   const OptionalTensor& seed) {
  const auto n = check_lora_linear(x, weight, bias, lora_A, lora_B, dropout_p, seed);
  const auto guard = guard_of(x);
  const DropoutSource dropout = make_dropout(x, dropout_p, seed);
  const Tensor rows = rows_of(x, n.rows, n.in_features);
  auto [y, hidden] = dispatch(x, "x", [&](auto scalar) {
    const LowRankCall<typename decltype(scalar)::type> call;
    const Tensor hidden = call.project(rows, lora_A, dropout, 1.0);
    const Tensor y = call.expand(x.options(), bias, hidden, lora_B.t(), DropoutSource(), scaling);
    return std::make_tuple(y, hidden);
  });
  y.addmm_(rows, weight.t());
  return {y.view(output_shape(x, n.out_features)), hidden};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad,
                                            const Tensor& x,
                                            const Tensor& weight,
                                            const Tensor& lora_A,
                                            const Tensor& lora_B,
                                            const Tensor& hidden,
                                            double scaling,
                                            double dropout_p,
                                            const OptionalTensor& seed,
                                            bool needs_x,
                                            bool needs_A,
                                            bool needs_B) {
  const auto n = check_lora_linear(x, weight, std::nullopt, lora_A, lora_B, dropout_p, seed);
  check_grad(grad, "grad", x, n.rows, n.out_features);
  const auto guard = guard_of(x);
  const DropoutSource dropout = make_dropout(x, dropout_p, seed);
  const Tensor grad_rows = rows_of(grad, n.rows, n.out_features);
  return dispatch(x, "x", [&](auto scalar) -> std::tuple<Tensor, Tensor, Tensor> {
    const LowRankCall<typename decltype(scalar)::type> call;
    Tensor grad_hidden, grad_x = at::empty({0}, x.options());
    Tensor grad_A = at::empty({0}, lora_A.options()), grad_B = at::empty({0}, lora_B.options());
    if (needs_B) {
      std::tie(grad_hidden, grad_B) = call.backward_output(grad_rows, hidden, lora_B, scaling);
    } else {
      grad_hidden = call.project(grad_rows, lora_B.t(), DropoutSource(), scaling);
    }
    if (needs_A) {
      const Tensor rows = rows_of(x, n.rows, n.in_features);
      grad_A = call.backward_A(rows, grad_hidden, lora_A.options(), dropout);
    }
    if (needs_x) {
      grad_x = call.expand(x.options(), std::nullopt, grad_hidden, lora_A, dropout, 1.0);
      grad_x = grad_x.addmm_(grad_rows, weight).view(x.sizes());
    }
    return {grad_x, grad_A, grad_B};
  });
}

Tensor lora_linear(const Tensor& x,
                   const Tensor& weight,
                   const OptionalTensor& bias,
                   const Tensor& lora_A,
                   const Tensor& lora_B,
                   double scaling,
                   double dropout_p,
                   const OptionalTensor& seed) {
  return std::get<0>(forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed));
}

Tensor dropout_mask(const Tensor& x, double dropout_p, const Tensor& seed) {
  TORCH_CHECK(x.dim() >= 1, "x must have at least one dimension, got ", x.sizes());
  const auto guard = guard_of(x);
  const int64_t columns = x.size(-1);
  const int64_t rows = x.numel() / std::max<int64_t>(columns, 1);
  const DropoutSource dropout = make_dropout(x, dropout_p, seed);
  const Tensor mask = at::empty(x.sizes(), x.options());
  dispatch(x, "x", [&](auto scalar) {
    using scalar_t = typename decltype(scalar)::type;
    draw_mask<scalar_t>({mutable_data_of<scalar_t>(mask), rows, columns}, dropout,
                        current_stream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return mask;
}

}  // namespace

TORCH_LIBRARY_IMPL(gauge_ext, CUDA, m) {
  m.impl("lora_linear", &lora_linear);
  m.impl("lora_linear_forward", &forward);
  m.impl("lora_linear_backward", &backward);
  m.impl("dropout_mask", &dropout_mask);
}

}  // namespace gauge_ext::cuda
