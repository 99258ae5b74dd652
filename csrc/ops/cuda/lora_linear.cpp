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

#include "ops/cuda/launch.h"

namespace gauge_ext::cuda {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A call's sizes, its factors, and the kernels for it.
template <typename scalar_t>
struct Call {
  using acc_t = typename AccOf<scalar_t>::type;

  LoraLinearSizes n;
  DropoutSource dropout;
  const Tensor& A;  // (r, in)
  const Tensor& B;  // (out, r)
  at::TensorOptions acc;
  const LowRankKernels<scalar_t>& kernels = low_rank_kernels<scalar_t>();
  Stream stream = current_stream();

  Call(const LoraLinearSizes& n,
       const DropoutSource& dropout,
       const Tensor& lora_A,
       const Tensor& lora_B)
      : n(n), dropout(dropout), A(lora_A), B(lora_B), acc(A.options().dtype(acc_dtype<acc_t>())) {}

  Tensor scratch(int64_t numbers) const { return at::empty({numbers}, acc); }

  // rows: (N, columns). H = scale · (rows ∘ M) rightᵀ, (N, r)
  Tensor project(const Tensor& rows,
                 const Tensor& right,
                 const DropoutSource& dropout,
                 double scale) const {
    const Tensor hidden = at::empty({n.rows, n.rank}, acc);
    const Tensor partial = scratch(kernels.projected_size(n.rows, rows.size(1), n.rank));
    kernels.project(matrix<scalar_t>(rows), factor(right), n.rank, dropout,
                    static_cast<acc_t>(scale), mutable_data_of<acc_t>(hidden),
                    mutable_data_of<acc_t>(partial), stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return hidden;
  }

  // Y = bias + scale · (left right) ∘ M, (N, columns) in x's type
  Tensor expand(const at::TensorOptions& options,
                const OptionalTensor& bias,
                const Tensor& left,
                const Tensor& right,
                const DropoutSource& dropout,
                double scale) const {
    const Tensor y = at::empty({n.rows, right.size(1)}, options);
    const Tensor dense = bias.has_value() ? bias->contiguous() : Tensor();
    kernels.expand({mutable_data_of<scalar_t>(y), y.size(0), y.size(1)}, /*add=*/false,
                   bias.has_value() ? data_of<scalar_t>(dense) : nullptr, data_of<acc_t>(left),
                   factor(right), n.rank, dropout, static_cast<acc_t>(scale), stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return y;
  }

  // grad_hidden = s · grad B, (N, r), and grad_B = s · gradᵀ hidden, (out, r), in one pass
  std::tuple<Tensor, Tensor> backward_output(const Tensor& grad,
                                             const Tensor& hidden,
                                             double scaling) const {
    const Tensor grad_hidden = at::empty({n.rows, n.rank}, acc);
    const Tensor grad_B = at::empty({n.out_features, n.rank}, B.options());
    const Tensor partial = scratch(kernels.project_reduced_size(n.rows, n.out_features, n.rank));
    kernels.project_reduce(matrix<scalar_t>(grad), factor(B.t()), data_of<acc_t>(hidden), n.rank,
                           static_cast<acc_t>(scaling), mutable_data_of<acc_t>(grad_hidden),
                           mutable_factor(grad_B.t()), mutable_data_of<acc_t>(partial), stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return {grad_hidden, grad_B};
  }

  // grad_A = grad_hiddenᵀ (x ∘ M), (r, in), the mask drawn again
  Tensor backward_A(const Tensor& x, const Tensor& grad_hidden) const {
    const Tensor grad_A = at::empty({n.rank, n.in_features}, A.options());
    const Tensor partial = scratch(kernels.reduced_size(n.rows, n.in_features, n.rank));
    kernels.reduce(matrix<scalar_t>(x), data_of<acc_t>(grad_hidden), n.rank, dropout, acc_t(1),
                   mutable_factor(grad_A), mutable_data_of<acc_t>(partial), stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return grad_A;
  }
};

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
  const Tensor rows = x.contiguous().view({n.rows, n.in_features});
  auto [y, hidden] = dispatch(x, "x", [&](auto scalar) {
    const Call<typename decltype(scalar)::type> call(n, dropout, lora_A, lora_B);
    const Tensor hidden = call.project(rows, call.A, dropout, 1.0);
    const Tensor y = call.expand(x.options(), bias, hidden, call.B.t(), DropoutSource(), scaling);
    return std::make_tuple(y, hidden);
  });
  y.addmm_(rows, weight.t());
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = n.out_features;
  return {y.view(shape), hidden};
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
  TORCH_CHECK(grad.dim() == x.dim() && grad.size(-1) == n.out_features &&
                  grad.numel() == n.rows * n.out_features,
              "grad must have shape [*batch, out] = [*, ", n.out_features, "] to fit x ", x.sizes(),
              ", got ", grad.sizes());
  const auto guard = guard_of(x);
  const DropoutSource dropout = make_dropout(x, dropout_p, seed);
  const Tensor grad_rows = grad.contiguous().view({n.rows, n.out_features});
  return dispatch(x, "x", [&](auto scalar) -> std::tuple<Tensor, Tensor, Tensor> {
    const Call<typename decltype(scalar)::type> call(n, dropout, lora_A, lora_B);
    Tensor grad_hidden, grad_x = at::empty({0}, x.options());
    Tensor grad_A = at::empty({0}, lora_A.options()), grad_B = at::empty({0}, lora_B.options());
    if (needs_B) {
      const Tensor left = hidden.to(call.acc.dtype().toScalarType()).contiguous();
      std::tie(grad_hidden, grad_B) = call.backward_output(grad_rows, left, scaling);
    } else {
      grad_hidden = call.project(grad_rows, call.B.t(), DropoutSource(), scaling);
    }
    if (needs_A) {
      const Tensor rows = x.contiguous().view({n.rows, n.in_features});
      grad_A = call.backward_A(rows, grad_hidden);
    }
    if (needs_x) {
      grad_x = call.expand(x.options(), std::nullopt, grad_hidden, call.A, dropout, 1.0);
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
