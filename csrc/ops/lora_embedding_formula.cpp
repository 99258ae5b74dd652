// lora_embedding in plain ATen, its autograd formula, and what torch.func and autocast see of it.

#include "ops/lora_embedding.h"

#include <tuple>

#include <ATen/core/Tensor.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/embedding_backward.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/formula.h"

namespace gauge_ext {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Padding = std::optional<int64_t>;

using EmbeddingSchema =
    Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, Padding);
using BackwardSchema = std::tuple<Tensor, Tensor>(const Tensor&,
                                                  const Tensor&,
                                                  const Tensor&,
                                                  const Tensor&,
                                                  double,
                                                  Padding,
                                                  bool,
                                                  bool);

// The formula in ATen, for whatever differentiates through operators, and for a table that is
// trained too.
Tensor lora_embedding_composite(const Tensor& ids,
                                const Tensor& weight,
                                const Tensor& lora_A,
                                const Tensor& lora_B,
                                double scaling,
                                Padding padding_idx) {
  const int64_t padding = padding_idx.value_or(-1);
  const Tensor y = at::embedding(weight, ids, padding);
  const Tensor update = at::linear(at::embedding(lora_A.t(), ids, padding), lora_B);
  return y + (update * scaling).to(y.scalar_type());
}

// The gradients of A and B in ATen: backward under create_graph. With the rows a_n = A[:, t_n],
//   dA[:, t] = s·sum of Bᵀ g_n over all n with t_n = t, and nothing for the padding token,
//   dB = s·sum of g_n a_nᵀ.
variable_list differentiable_backward(const Tensor& grad,
                                      const Tensor& ids,
                                      const Tensor& lora_A,
                                      const Tensor& lora_B,
                                      double scaling,
                                      Padding padding_idx) {
  const int64_t padding = padding_idx.value_or(-1);
  const Tensor flat = ids.reshape({-1});
  const Tensor grad2d = flatten(grad, lora_B.sym_size(0)).to(lora_B.scalar_type());
  const Tensor grad_hidden = at::matmul(grad2d, lora_B) * scaling;
  const Tensor grad_A = at::embedding_backward_symint(grad_hidden, flat, lora_A.sym_size(1),
                                                      padding, /*scale_grad_by_freq=*/false,
                                                      /*sparse=*/false);
  const Tensor hidden = at::embedding(lora_A.t(), flat, padding);
  return {grad_A.t(), at::matmul(grad2d.t(), hidden) * scaling};
}

class LoraEmbeddingFunction : public torch::autograd::Function<LoraEmbeddingFunction> {
 public:
  static Tensor forward(AutogradContext* ctx,
                        const Tensor& ids,
                        const Tensor& weight,
                        const Tensor& lora_A,
                        const Tensor& lora_B,
                        double scaling,
                        Padding padding_idx) {
    static const auto op = find<EmbeddingSchema>("gauge_ext::lora_embedding");
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor y = op.call(ids, weight, lora_A, lora_B, scaling, padding_idx);
    // The factors live anyway: beyond them only ids is kept. The (N, r) rows of A are read again.
    ctx->save_for_backward({ids, lora_A, lora_B});
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["padding_idx"] = padding_idx;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &ids = saved[0], &lora_A = saved[1], &lora_B = saved[2];
    const double scaling = ctx->saved_data["scaling"].toDouble();
    const auto padding_idx = ctx->saved_data["padding_idx"].toOptional<int64_t>();
    const bool needs_A = ctx->needs_input_grad(2), needs_B = ctx->needs_input_grad(3);
    variable_list result(6);  // ids, weight, lora_A, lora_B, scaling, padding_idx
    if (!grads[0].defined()) {
      return result;
    }
    if (at::GradMode::is_enabled()) {
      const auto exact =
          differentiable_backward(grads[0], ids, lora_A, lora_B, scaling, padding_idx);
      result[2] = exact[0];
      result[3] = exact[1];
    } else {
      static const auto op = find<BackwardSchema>("gauge_ext::lora_embedding_backward");
      auto [grad_A, grad_B] =
          op.call(grads[0], ids, lora_A, lora_B, scaling, padding_idx, needs_A, needs_B);
      result[2] = needs_A ? grad_A : Tensor();
      result[3] = needs_B ? grad_B : Tensor();
    }
    return result;
  }
};

Tensor lora_embedding_autograd(const Tensor& ids,
                               const Tensor& weight,
                               const Tensor& lora_A,
                               const Tensor& lora_B,
                               double scaling,
                               Padding padding_idx) {
  const bool transformed = is_transformed(ids) || is_transformed(weight) ||
                           is_transformed(lora_A) || is_transformed(lora_B);
  const bool recorded = at::GradMode::is_enabled();
  if (transformed || (recorded && weight.requires_grad())) {
    return lora_embedding_composite(ids, weight, lora_A, lora_B, scaling, padding_idx);
  }
  if (recorded && (lora_A.requires_grad() || lora_B.requires_grad())) {
    return LoraEmbeddingFunction::apply(ids, weight, lora_A, lora_B, scaling, padding_idx);
  }
  static const auto op = find<EmbeddingSchema>("gauge_ext::lora_embedding");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(ids, weight, lora_A, lora_B, scaling, padding_idx);
}

// torch casts no table of an embedding; the factors keep their dtype, as in the other ops.
Tensor lora_embedding_autocast(const Tensor& ids,
                               const Tensor& weight,
                               const Tensor& lora_A,
                               const Tensor& lora_B,
                               double scaling,
                               Padding padding_idx) {
  static const auto op = find<EmbeddingSchema>("gauge_ext::lora_embedding");
  const Autocast off(weight);
  return op.call(ids, weight, lora_A, lora_B, scaling, padding_idx);
}

}  // namespace

TORCH_LIBRARY_IMPL(gauge_ext, Autograd, m) {
  m.impl("lora_embedding", &lora_embedding_autograd);
}

TORCH_LIBRARY_IMPL(gauge_ext, AutocastCPU, m) {
  m.impl("lora_embedding", &lora_embedding_autocast);
}

// torch.vmap sees the parts, each of which has its batching rule.
TORCH_LIBRARY_IMPL(gauge_ext, FuncTorchBatched, m) {
  m.impl("lora_embedding", &lora_embedding_composite);
}

}  // namespace gauge_ext
