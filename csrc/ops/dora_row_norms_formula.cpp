// dora_row_norms in plain ATen, and what autograd and torch.func see of it: a constant.

#include <ATen/core/Tensor.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/matmul.h>
#include <torch/library.h>

#include "ops/dora_row_norms.h"
#include "ops/formula.h"

namespace gauge_ext {
namespace {

using at::Tensor;
using NormSchema = Tensor(const Tensor&, const Tensor&, const Tensor&, double);

// ‖W_i + s b_i A‖² = ‖W_i‖² + 2 s ⟨W_i Aᵀ, b_i⟩ + s² b_i A Aᵀ b_iᵀ, with no matrix of W's size.
// Detached, so that neither a derivative nor a tangent passes.
Tensor row_norms_composite(const Tensor& weight,
                           const Tensor& lora_A,
                           const Tensor& lora_B,
                           double scaling) {
  const auto wide = row_norm_dtype(weight, lora_A, lora_B);
  const Tensor w = weight.detach().to(wide), a = lora_A.detach().to(wide);
  const Tensor b = lora_B.detach().to(wide), a_t = a.transpose(0, 1);
  const Tensor products = at::matmul(w, a_t) * (2.0 * scaling) +
                          at::matmul(b, at::matmul(a, a_t)) * (scaling * scaling);
  const Tensor squares = at::linalg_vector_norm(w, 2, at::IntArrayRef{1}).square();
  // Rounding may leave a row of zeros a little below zero.
  return (squares + (products * b).sum(1)).clamp_min(0.0).sqrt();
}

Tensor row_norms_autograd(const Tensor& weight,
                          const Tensor& lora_A,
                          const Tensor& lora_B,
                          double scaling) {
  if (is_transformed(weight) || is_transformed(lora_A) || is_transformed(lora_B)) {
    return row_norms_composite(weight, lora_A, lora_B, scaling);
  }
  static const auto op = find<NormSchema>("gauge_ext::dora_row_norms");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(weight, lora_A, lora_B, scaling);
}

}  // namespace

TORCH_LIBRARY_IMPL(gauge_ext, Autograd, m) {
  m.impl("dora_row_norms", &row_norms_autograd);
}

// torch.vmap sees the parts, each of which has its batching rule.
TORCH_LIBRARY_IMPL(gauge_ext, FuncTorchBatched, m) {
  m.impl("dora_row_norms", &row_norms_composite);
}

}  // namespace gauge_ext
