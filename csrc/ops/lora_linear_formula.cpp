// lora_linear in plain ATen, its autograd formula, and what torch.func and autocast see of it.

#include "ops/lora_linear.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/formula.h"

namespace gauge_ext {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using ForwardSchema = std::tuple<Tensor, Tensor>(const Tensor&,
                                                 const Tensor&,
                                                 const OptionalTensor&,
                                                 const Tensor&,
                                                 const Tensor&,
                                                 double,
                                                 double,
                                                 const OptionalTensor&);
using BackwardSchema = std::tuple<Tensor, Tensor, Tensor>(const Tensor&,
                                                          const Tensor&,
                                                          const Tensor&,
                                                          const Tensor&,
                                                          const Tensor&,
                                                          const Tensor&,
                                                          double,
                                                          double,
                                                          const OptionalTensor&,
                                                          bool,
                                                          bool,
                                                          bool);
using MaskSchema = Tensor(const Tensor&, double, const Tensor&);

// x ∘ M, and the mask M itself where dropout is on: both differentiable in x.
Tensor masked(const Tensor& x, double dropout_p, const OptionalTensor& seed) {
  if (dropout_p == 0.0) {
    return x;
  }
  static const auto mask = find<MaskSchema>("gauge_ext::dropout_mask");
  return x * mask.call(x.detach(), dropout_p, *seed);
}

// The formula in ATen, for whatever differentiates through operators: torch.func, forward mode.
Tensor lora_linear_composite(const Tensor& x,
                             const Tensor& weight,
                             const OptionalTensor& bias,
                             const Tensor& lora_A,
                             const Tensor& lora_B,
                             double scaling,
                             double dropout_p,
                             const OptionalTensor& seed) {
  const Tensor y = at::linear(x, weight, bias);
  const Tensor dropped = masked(x, dropout_p, seed).to(lora_A.scalar_type());
  const Tensor update = at::linear(at::linear(dropped, lora_A), lora_B);
  return y + (update * scaling).to(y.scalar_type());
}

}  // namespace

std::vector<Tensor> differentiable_lora_linear_backward(const Tensor& grad,
                                                        const Tensor& x,
                                                        const Tensor& weight,
                                                        const Tensor& lora_A,
                                                        const Tensor& lora_B,
                                                        double scaling,
                                                        double dropout_p,
                                                        const OptionalTensor& seed) {
  const auto dtype = lora_A.scalar_type();
  const Tensor grad2d = flatten(grad, weight.sym_size(0));
  const Tensor x2d = flatten(x, weight.sym_size(1));
  const Tensor dropped = masked(x2d, dropout_p, seed).to(dtype);
  const Tensor grad_hidden = at::matmul(grad2d.to(dtype), lora_B) * scaling;  // (N, r)
  Tensor grad_dropped = at::matmul(grad_hidden, lora_A).to(x.scalar_type());
  grad_dropped = masked(grad_dropped, dropout_p, seed);
  const Tensor grad_x = (at::matmul(grad2d, weight) + grad_dropped).view_symint(x.sym_sizes());
  const Tensor grad_A = at::matmul(grad_hidden.t(), dropped);
  const Tensor hidden = at::matmul(dropped, lora_A.t());
  const Tensor grad_B = at::matmul(grad2d.to(dtype).t(), hidden) * scaling;
  return {grad_x, grad_A, grad_B};
}

namespace {

class LoraLinearFunction : public torch::autograd::Function<LoraLinearFunction> {
 public:
  static Tensor forward(AutogradContext* ctx,
                        const Tensor& x,
                        const Tensor& weight,
                        const OptionalTensor& bias,
                        const Tensor& lora_A,
                        const Tensor& lora_B,
                        double scaling,
                        double dropout_p,
                        const OptionalTensor& seed) {
    static const auto forward_op = find<ForwardSchema>("gauge_ext::lora_linear_forward");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, hidden] = forward_op.call(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed);
    // The parameters live anyway: beyond them only x and the (N, r) product are kept.
    ctx->save_for_backward(
        {x, weight, lora_A, lora_B, hidden, seed.has_value() ? *seed : Tensor()});
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->saved_data["has_bias"] = bias.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &lora_A = saved[2], &lora_B = saved[3];
    const OptionalTensor seed = saved[5].defined() ? OptionalTensor(saved[5]) : std::nullopt;
    const double scaling = ctx->saved_data["scaling"].toDouble();
    const double dropout_p = ctx->saved_data["dropout_p"].toDouble();
    const Tensor& grad = grads[0];
    // needs_input_grad counts tensors alone: where there is no bias, what follows moves up.
    const bool has_bias = ctx->saved_data["has_bias"].toBool();
    const bool needs_x = ctx->needs_input_grad(0);
    const bool needs_weight = ctx->needs_input_grad(1);
    const bool needs_bias = has_bias && ctx->needs_input_grad(2);
    const bool needs_A = ctx->needs_input_grad(has_bias ? 3 : 2);
    const bool needs_B = ctx->needs_input_grad(has_bias ? 4 : 3);

    variable_list result(8);  // x, weight, bias, lora_A, lora_B, then what has no gradient
    if (!grad.defined()) {
      return result;
    }
    if (at::GradMode::is_enabled()) {
      const auto exact = differentiable_lora_linear_backward(grad, x, weight, lora_A, lora_B,
                                                             scaling, dropout_p, seed);
      result[0] = exact[0];
      result[3] = exact[1];
      result[4] = exact[2];
    } else {
      static const auto backward_op = find<BackwardSchema>("gauge_ext::lora_linear_backward");
      auto [grad_x, grad_A, grad_B] =
          backward_op.call(grad, x, weight, lora_A, lora_B, saved[4], scaling, dropout_p, seed,
                           needs_x, needs_A, needs_B);
      result[0] = needs_x ? grad_x : Tensor();
      result[3] = needs_A ? grad_A : Tensor();
      result[4] = needs_B ? grad_B : Tensor();
    }
    result[1] = needs_weight ? grad_weight(grad, x, weight) : Tensor();
    result[2] = needs_bias ? grad_bias(grad, weight) : Tensor();
    return result;
  }
};

bool requires_grad(const Tensor& tensor) {
  return tensor.requires_grad();
}

Tensor lora_linear_autograd(const Tensor& x,
                            const Tensor& weight,
                            const OptionalTensor& bias,
                            const Tensor& lora_A,
                            const Tensor& lora_B,
                            double scaling,
                            double dropout_p,
                            const OptionalTensor& seed) {
  const auto any = [&](auto predicate) {
    return predicate(x) || predicate(lora_A) || predicate(lora_B) || predicate(weight) ||
           (bias.has_value() && predicate(*bias));
  };
  if (any(is_transformed)) {
    return lora_linear_composite(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed);
  }
  if (at::GradMode::is_enabled() && any(requires_grad)) {
    return LoraLinearFunction::apply(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed);
  }
  static const auto linear_op = find<LoraLinearSchema>("gauge_ext::lora_linear");
  at::AutoDispatchBelowADInplaceOrView guard;
  return linear_op.call(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed);
}

Tensor lora_linear_autocast(const Tensor& x,
                            const Tensor& weight,
                            const OptionalTensor& bias,
                            const Tensor& lora_A,
                            const Tensor& lora_B,
                            double scaling,
                            double dropout_p,
                            const OptionalTensor& seed) {
  static const auto linear_op = find<LoraLinearSchema>("gauge_ext::lora_linear");
  const Autocast cast(x);
  return linear_op.call(cast(x), cast(weight), cast(bias), lora_A, lora_B, scaling, dropout_p,
                        seed);
}

}  // namespace

TORCH_LIBRARY_IMPL(gauge_ext, Autograd, m) {
  m.impl("lora_linear", &lora_linear_autograd);
}

TORCH_LIBRARY_IMPL(gauge_ext, AutocastCPU, m) {
  m.impl("lora_linear", &lora_linear_autocast);
}

TORCH_LIBRARY_IMPL(gauge_ext, AutocastCUDA, m) {
  m.impl("lora_linear", &lora_linear_autocast);
}

// torch.vmap sees the parts, each of which has its batching rule.
TORCH_LIBRARY_IMPL(gauge_ext, FuncTorchBatched, m) {
  m.impl("lora_linear", &lora_linear_composite);
}

}  // namespace gauge_ext
