#include "ops/lora_linear.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "check.h"

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
using LinearSchema = Tensor(const Tensor&,
                            const Tensor&,
                            const OptionalTensor&,
                            const Tensor&,
                            const Tensor&,
                            double,
                            double,
                            const OptionalTensor&);
using MaskSchema = Tensor(const Tensor&, double, const Tensor&);

template <typename Schema>
c10::TypedOperatorHandle<Schema> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Schema>();
}

Tensor flatten(const Tensor& tensor, const c10::SymInt& columns) {
  return tensor.reshape_symint({-1, columns});
}

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

bool is_transformed(const Tensor& tensor) {
  return tensor._fw_grad(/*level=*/0).defined() ||
         tensor.key_set().has(c10::DispatchKey::FuncTorchGradWrapper);
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
    // The base is frozen as a rule; where it is not, its gradients are those of a linear layer.
    if (needs_weight) {
      const Tensor grad2d = flatten(grad, weight.sym_size(0));
      result[1] = at::matmul(grad2d.t(), flatten(x, weight.sym_size(1)));
    }
    if (needs_bias) {
      result[2] = flatten(grad, weight.sym_size(0)).sum(0);
    }
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
  static const auto linear_op = find<LinearSchema>("gauge_ext::lora_linear");
  at::AutoDispatchBelowADInplaceOrView guard;
  return linear_op.call(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed);
}

// Under autocast the base computes as nn.Linear does, in the lower precision; the adapter keeps its
// own dtype, which costs nothing, since its products are accumulated in float32 anyway.
Tensor lora_linear_autocast(const Tensor& x,
                            const Tensor& weight,
                            const OptionalTensor& bias,
                            const Tensor& lora_A,
                            const Tensor& lora_B,
                            double scaling,
                            double dropout_p,
                            const OptionalTensor& seed) {
  static const auto linear_op = find<LinearSchema>("gauge_ext::lora_linear");
  const auto device = x.device().type();
  c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const Tensor& tensor) {
    return at::autocast::cached_cast(dtype, tensor, device);
  };
  return linear_op.call(cast(x), cast(weight),
                        bias.has_value() ? OptionalTensor(cast(*bias)) : std::nullopt, lora_A,
                        lora_B, scaling, dropout_p, seed);
}

}  // namespace

LoraLinearSizes check_lora_linear(const Tensor& x,
                                  const Tensor& weight,
                                  const OptionalTensor& bias,
                                  const Tensor& lora_A,
                                  const Tensor& lora_B,
                                  double dropout_p,
                                  const OptionalTensor& seed) {
  TORCH_CHECK(weight.dim() == 2, "weight must have shape [out, in], got ", weight.sizes());
  const int64_t out_features = weight.size(0);
  const int64_t in_features = weight.size(1);
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == in_features, "x must have shape [*batch, in] = [*, ",
              in_features, "] to fit weight ", weight.sizes(), ", got ", x.sizes());
  TORCH_CHECK(lora_A.dim() == 2, "lora_A must have shape [r, in], got ", lora_A.sizes());
  const int64_t rank = lora_A.size(0);
  check_matrix(lora_A, "lora_A", "[r, in]", rank, in_features);
  check_matrix(lora_B, "lora_B", "[out, r]", out_features, rank);
  check_same_dtype(weight, "weight", x);
  check_same_device(weight, "weight", x);
  check_same_device(lora_A, "lora_A", x);
  check_same_device(lora_B, "lora_B", x);
  if (bias.has_value()) {
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out_features, "bias must have shape [out] = [",
                out_features, "], got ", bias->sizes());
    check_same_dtype(*bias, "bias", x);
    check_same_device(*bias, "bias", x);
  }
  TORCH_CHECK(lora_A.scalar_type() == x.scalar_type() || lora_A.scalar_type() == at::kFloat,
              "lora_A must have x's dtype, ", x.scalar_type(), ", or float32, got ",
              lora_A.scalar_type());
  TORCH_CHECK(lora_B.scalar_type() == lora_A.scalar_type(), "lora_B must have lora_A's dtype, ",
              lora_A.scalar_type(), ", got ", lora_B.scalar_type());
  TORCH_CHECK(dropout_p >= 0.0 && dropout_p <= 1.0, "dropout_p must be in [0, 1], got ", dropout_p);
  if (dropout_p > 0.0) {
    TORCH_CHECK(seed.has_value(),
                "seed must be a 0-dim int64 tensor where dropout_p > 0, got None");
    TORCH_CHECK(seed->dim() == 0 && seed->scalar_type() == at::kLong,
                "seed must be a 0-dim int64 tensor, got ", seed->scalar_type(), " of shape ",
                seed->sizes());
  }
  return {x.numel() / std::max<int64_t>(in_features, 1), in_features, out_features, rank};
}

TORCH_LIBRARY_FRAGMENT(gauge_ext, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, "
      "float scaling, float dropout_p=0.0, Tensor? seed=None) -> Tensor",
      tags);
  // (y, hidden): hidden is s-free, (N, r), the product of the dropped x with lora_A.
  m.def(
      "lora_linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, "
      "float scaling, float dropout_p, Tensor? seed) -> (Tensor, Tensor)",
      tags);
  // (grad_x, grad_A, grad_B); those that are not wanted come back with no elements.
  m.def(
      "lora_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, "
      "Tensor hidden, float scaling, float dropout_p, Tensor? seed, bool needs_x, bool needs_A, "
      "bool needs_B) -> (Tensor, Tensor, Tensor)",
      tags);
  // The multipliers of inverted dropout, of x's shape and dtype.
  m.def("dropout_mask(Tensor x, float dropout_p, Tensor seed) -> Tensor", tags);
}

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
