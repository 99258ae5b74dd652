// dora_scale in plain ATen, its autograd formula, and what torch.func sees of it. Nothing is
// registered for autocast: torch casts no elementwise product either.

#include <tuple>

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/dora_scale.h"
#include "ops/formula.h"

namespace gauge_ext {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using ScaleSchema = Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&);
using BackwardSchema =
    std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, bool, bool);

// The formula in ATen, for whatever differentiates through operators
Tensor dora_scale_composite(const Tensor& y,
                            const Tensor& gain,
                            const std::optional<Tensor>& bias) {
  const Tensor scaled = y * gain;
  return (bias.has_value() ? scaled + *bias : scaled).to(y.scalar_type());
}

// The gradient of the gain in ATen, and with it that of the bias: sums over all rows.
Tensor sum_rows(const Tensor& products, const Tensor& like) {
  return flatten(products, like.sym_size(0)).sum(0).to(like.scalar_type());
}

class DoraScaleFunction : public torch::autograd::Function<DoraScaleFunction> {
 public:
  static Tensor forward(AutogradContext* ctx,
                        const Tensor& y,
                        const Tensor& gain,
                        const std::optional<Tensor>& bias) {
    static const auto op = find<ScaleSchema>("gauge_ext::dora_scale");
    at::AutoDispatchBelowADInplaceOrView guard;
    // y is kept for the gradient of the gain alone.
    ctx->save_for_backward({gain.requires_grad() ? y : Tensor(), gain,
                            bias.has_value() && bias->requires_grad() ? *bias : Tensor()});
    return op.call(y, gain, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &y = saved[0], &gain = saved[1], &bias = saved[2];
    const bool needs_y = ctx->needs_input_grad(0), needs_gain = ctx->needs_input_grad(1);
    const Tensor& grad = grads[0];
    variable_list result(3);  // y, gain, bias
    if (!grad.defined()) {
      return result;
    }
    if (at::GradMode::is_enabled()) {
      result[0] = needs_y ? (grad * gain).to(grad.scalar_type()) : Tensor();
      result[1] = needs_gain ? sum_rows(grad * y, gain) : Tensor();
    } else {
      static const auto op = find<BackwardSchema>("gauge_ext::dora_scale_backward");
      auto [grad_y, grad_gain] = op.call(grad, needs_gain ? y : grad, gain, needs_y, needs_gain);
      result[0] = needs_y ? grad_y : Tensor();
      result[1] = needs_gain ? grad_gain : Tensor();
    }
    if (bias.defined()) {
      result[2] = sum_rows(grad, bias);
    }
    return result;
  }
};

Tensor dora_scale_autograd(const Tensor& y, const Tensor& gain, const std::optional<Tensor>& bias) {
  if (is_transformed(y) || is_transformed(gain) || (bias.has_value() && is_transformed(*bias))) {
    return dora_scale_composite(y, gain, bias);
  }
  const bool trained =
      y.requires_grad() || gain.requires_grad() || (bias.has_value() && bias->requires_grad());
  if (at::GradMode::is_enabled() && trained) {
    return DoraScaleFunction::apply(y, gain, bias);
  }
  static const auto op = find<ScaleSchema>("gauge_ext::dora_scale");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(y, gain, bias);
}

}  // namespace

TORCH_LIBRARY_IMPL(gauge_ext, Autograd, m) {
  m.impl("dora_scale", &dora_scale_autograd);
}

// torch.vmap sees the parts, each of which has its batching rule.
TORCH_LIBRARY_IMPL(gauge_ext, FuncTorchBatched, m) {
  m.impl("dora_scale", &dora_scale_composite);
}

}  // namespace gauge_ext
