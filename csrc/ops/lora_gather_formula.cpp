// lora_gather in plain ATen, its autograd formula, and what torch.func and autocast see of it.

#include "ops/lora_gather.h"

#include <algorithm>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/formula.h"

namespace gauge_ext {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using GatherSchema = Tensor(const Tensor&,
                            const Tensor&,
                            const OptionalTensor&,
                            at::TensorList,
                            at::TensorList,
                            at::ArrayRef<double>,
                            const Tensor&);
using BackwardSchema =
    std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>>(const Tensor&,
                                                                 const Tensor&,
                                                                 const Tensor&,
                                                                 at::TensorList,
                                                                 at::TensorList,
                                                                 at::ArrayRef<double>,
                                                                 const Tensor&,
                                                                 bool,
                                                                 bool);

// (N, R), R the sum of all ranks: for each row the scaling in the columns of its own adapter.
Tensor own_columns(const Tensor& x2d,
                   at::TensorList lora_A,
                   at::ArrayRef<double> scaling,
                   const Tensor& index) {
  const auto options = x2d.options();
  std::vector<Tensor> values, owners;
  for (size_t i = 0; i < lora_A.size(); ++i) {
    const c10::SymInt rank = lora_A[i].sym_size(0);
    values.push_back(at::full_symint({rank}, scaling[i], options.dtype(lora_A[0].scalar_type())));
    owners.push_back(at::full_symint({rank}, static_cast<int64_t>(i), options.dtype(at::kLong)));
  }
  const Tensor owner = at::cat(owners), scale = at::cat(values);
  const Tensor flat = index.to(x2d.device()).reshape({-1});
  const auto each = x2d.sym_size(0) / std::max<c10::SymInt>(flat.sym_size(0), 1);
  const Tensor rows = flat.unsqueeze(1).expand_symint({-1, each}).reshape({-1, 1});
  return at::where(rows.eq(owner), scale, at::zeros({}, scale.options()));
}

// The formula in ATen over all adapters side by side, for whatever differentiates through
// operators.
Tensor lora_gather_composite(const Tensor& x,
                             const Tensor& weight,
                             const OptionalTensor& bias,
                             at::TensorList lora_A,
                             at::TensorList lora_B,
                             at::ArrayRef<double> scaling,
                             const Tensor& index) {
  const Tensor y = at::linear(x, weight, bias);
  if (lora_A.empty()) {
    return y;
  }
  const Tensor x2d = flatten(x, weight.sym_size(1)).to(lora_A[0].scalar_type());
  const Tensor hidden = at::matmul(x2d, at::cat(lora_A).t());
  const Tensor own = hidden * own_columns(x2d, lora_A, scaling, index);
  const Tensor update = at::matmul(own, at::cat(lora_B, 1).t());
  return y + update.view_symint(y.sym_sizes()).to(y.scalar_type());
}

// The gradients of x and of every factor in ATen: backward under create_graph.
variable_list differentiable_backward(const Tensor& grad,
                                      const Tensor& x,
                                      const Tensor& weight,
                                      at::TensorList lora_A,
                                      at::TensorList lora_B,
                                      at::ArrayRef<double> scaling,
                                      const Tensor& index) {
  const Tensor grad2d = flatten(grad, weight.sym_size(0));
  Tensor grad_x = at::matmul(grad2d, weight);
  variable_list result = {Tensor()};
  if (!lora_A.empty()) {
    const auto dtype = lora_A[0].scalar_type();
    const Tensor x2d = flatten(x, weight.sym_size(1)).to(dtype), wide = grad2d.to(dtype);
    const Tensor all_A = at::cat(lora_A), all_B = at::cat(lora_B, 1);
    const Tensor own = own_columns(x2d, lora_A, scaling, index);
    const Tensor grad_hidden = at::matmul(wide, all_B) * own;
    grad_x = grad_x + at::matmul(grad_hidden, all_A).to(grad_x.scalar_type());
    std::vector<int64_t> ranks;
    for (const auto& factor : lora_A) {
      ranks.push_back(factor.size(0));
    }
    const auto grads_A = at::matmul(grad_hidden.t(), x2d).split_with_sizes(ranks);
    const Tensor hidden = at::matmul(x2d, all_A.t()) * own;
    const auto grads_B = at::matmul(wide.t(), hidden).split_with_sizes(ranks, 1);
    result.insert(result.end(), grads_A.begin(), grads_A.end());
    result.insert(result.end(), grads_B.begin(), grads_B.end());
  }
  result[0] = grad_x.view_symint(x.sym_sizes());
  return result;
}

class LoraGatherFunction : public torch::autograd::Function<LoraGatherFunction> {
 public:
  static Tensor forward(AutogradContext* ctx,
                        const Tensor& x,
                        const Tensor& weight,
                        const OptionalTensor& bias,
                        at::TensorList lora_A,
                        at::TensorList lora_B,
                        const std::vector<double>& scaling,
                        const Tensor& index) {
    static const auto op = find<GatherSchema>("gauge_ext::lora_gather");
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor y = op.call(x, weight, bias, lora_A, lora_B, scaling, index);
    // The parameters live anyway: beyond them only x is kept. The (N, r) products are made again.
    variable_list saved = {x, weight, index};
    saved.insert(saved.end(), lora_A.begin(), lora_A.end());
    saved.insert(saved.end(), lora_B.begin(), lora_B.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["has_bias"] = bias.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &index = saved[2];
    const size_t count = (saved.size() - 3) / 2;
    const at::TensorList lora_A(saved.data() + 3, count), lora_B(saved.data() + 3 + count, count);
    const auto scaling = ctx->saved_data["scaling"].toDoubleVector();
    const Tensor& grad = grads[0];
    // needs_input_grad counts tensors alone: where there is no bias, what follows moves up.
    const bool has_bias = ctx->saved_data["has_bias"].toBool();
    const bool needs_x = ctx->needs_input_grad(0);
    const size_t first = has_bias ? 3 : 2;
    bool needs_factors = false;
    for (size_t i = 0; i < 2 * count; ++i) {
      needs_factors = needs_factors || ctx->needs_input_grad(first + i);
    }

    variable_list result(3 + 2 * count + 2);  // x, weight, bias, factors, scaling, index
    if (!grad.defined()) {
      return result;
    }
    if (at::GradMode::is_enabled()) {
      const auto exact = differentiable_backward(grad, x, weight, lora_A, lora_B, scaling, index);
      result[0] = exact[0];
      std::copy(exact.begin() + 1, exact.end(), result.begin() + 3);
    } else if (needs_x || needs_factors) {
      static const auto op = find<BackwardSchema>("gauge_ext::lora_gather_backward");
      auto [grad_x, grads_A, grads_B] =
          op.call(grad, x, weight, lora_A, lora_B, scaling, index, needs_x, needs_factors);
      result[0] = needs_x ? grad_x : Tensor();
      if (needs_factors) {
        std::copy(grads_A.begin(), grads_A.end(), result.begin() + 3);
        std::copy(grads_B.begin(), grads_B.end(), result.begin() + 3 + count);
      }
    }
    result[1] = ctx->needs_input_grad(1) ? grad_weight(grad, x, weight) : Tensor();
    result[2] = has_bias && ctx->needs_input_grad(2) ? grad_bias(grad, weight) : Tensor();
    return result;
  }
};

Tensor lora_gather_autograd(const Tensor& x,
                            const Tensor& weight,
                            const OptionalTensor& bias,
                            at::TensorList lora_A,
                            at::TensorList lora_B,
                            at::ArrayRef<double> scaling,
                            const Tensor& index) {
  const auto any = [&](auto predicate) {
    return predicate(x) || predicate(weight) || (bias.has_value() && predicate(*bias)) ||
           std::any_of(lora_A.begin(), lora_A.end(), predicate) ||
           std::any_of(lora_B.begin(), lora_B.end(), predicate);
  };
  if (any(is_transformed)) {
    return lora_gather_composite(x, weight, bias, lora_A, lora_B, scaling, index);
  }
  if (at::GradMode::is_enabled() &&
      any([](const Tensor& tensor) { return tensor.requires_grad(); })) {
    return LoraGatherFunction::apply(x, weight, bias, lora_A, lora_B, scaling.vec(), index);
  }
  static const auto op = find<GatherSchema>("gauge_ext::lora_gather");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(x, weight, bias, lora_A, lora_B, scaling, index);
}

Tensor lora_gather_autocast(const Tensor& x,
                            const Tensor& weight,
                            const OptionalTensor& bias,
                            at::TensorList lora_A,
                            at::TensorList lora_B,
                            at::ArrayRef<double> scaling,
                            const Tensor& index) {
  static const auto op = find<GatherSchema>("gauge_ext::lora_gather");
  const Autocast cast(x);
  return op.call(cast(x), cast(weight), cast(bias), lora_A, lora_B, scaling, index);
}

}  // namespace

TORCH_LIBRARY_IMPL(gauge_ext, Autograd, m) {
  m.impl("lora_gather", &lora_gather_autograd);
}

TORCH_LIBRARY_IMPL(gauge_ext, AutocastCPU, m) {
  m.impl("lora_gather", &lora_gather_autocast);
}

TORCH_LIBRARY_IMPL(gauge_ext, AutocastCUDA, m) {
  m.impl("lora_gather", &lora_gather_autocast);
}

// torch.vmap sees the parts, each of which has its batching rule.
TORCH_LIBRARY_IMPL(gauge_ext, FuncTorchBatched, m) {
  m.impl("lora_gather", &lora_gather_composite);
}

}  // namespace gauge_ext
