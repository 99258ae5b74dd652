// lora_linear_group by its members, its autograd formula, and what torch.func and autocast see of
// it.

#include "ops/lora_linear_group.h"

#include <algorithm>

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/formula.h"
#include "ops/lora_linear.h"

namespace gauge_ext {
namespace {

using at::Tensor;
using at::TensorList;
using OptionalTensor = std::optional<Tensor>;
using Scalings = at::ArrayRef<double>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using GroupSchema = std::vector<Tensor>(const Tensor&,
                                        TensorList,
                                        const OptionalTensors&,
                                        TensorList,
                                        TensorList,
                                        Scalings,
                                        double,
                                        TensorList);
using ForwardSchema = std::tuple<std::vector<Tensor>, std::vector<Tensor>>(const Tensor&,
                                                                           TensorList,
                                                                           const OptionalTensors&,
                                                                           TensorList,
                                                                           TensorList,
                                                                           Scalings,
                                                                           double,
                                                                           TensorList);
using BackwardSchema = std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>>(TensorList,
                                                                                    const Tensor&,
                                                                                    TensorList,
                                                                                    TensorList,
                                                                                    TensorList,
                                                                                    TensorList,
                                                                                    Scalings,
                                                                                    double,
                                                                                    TensorList,
                                                                                    bool,
                                                                                    bool);

// Member by member, for whatever differentiates through operators or batches them.
std::vector<Tensor> group_composite(const Tensor& x,
                                    TensorList weights,
                                    const OptionalTensors& biases,
                                    TensorList lora_As,
                                    TensorList lora_Bs,
                                    Scalings scalings,
                                    double dropout_p,
                                    TensorList seeds) {
  check_group_lengths(weights, biases.size(), lora_As, lora_Bs, scalings, dropout_p, seeds);
  static const auto linear = find<LoraLinearSchema>("gauge_ext::lora_linear");
  std::vector<Tensor> ys;
  for (size_t i = 0; i < weights.size(); ++i) {
    ys.push_back(linear.call(x, weights[i], biases.get(i), lora_As[i], lora_Bs[i], scalings[i],
                             dropout_p, seed_of(seeds, i)));
  }
  return ys;
}

// The first `count` of `tensors` from `at` on, and `at` moved behind them.
variable_list take(const variable_list& tensors, size_t count, size_t& at) {
  const auto first = tensors.begin() + static_cast<std::ptrdiff_t>(at);
  at += count;
  return {first, first + static_cast<std::ptrdiff_t>(count)};
}

class LoraLinearGroupFunction : public torch::autograd::Function<LoraLinearGroupFunction> {
 public:
  // `biases` holds those that are not None, and bias_of where each member's is in it, or -1.
  static variable_list forward(AutogradContext* ctx,
                               const Tensor& x,
                               TensorList weights,
                               TensorList biases,
                               const std::vector<int64_t>& bias_of,
                               TensorList lora_As,
                               TensorList lora_Bs,
                               TensorList seeds,
                               Scalings scalings,
                               double dropout_p) {
    static const auto forward_op = find<ForwardSchema>("gauge_ext::lora_linear_group_forward");
    at::AutoDispatchBelowADInplaceOrView guard;
    OptionalTensors optional_biases;
    for (const int64_t place : bias_of) {
      optional_biases.push_back(place < 0 ? std::nullopt : OptionalTensor(biases[place]));
    }
    auto [ys, hiddens] =
        forward_op.call(x, weights, optional_biases, lora_As, lora_Bs, scalings, dropout_p, seeds);
    variable_list saved = {x};
    for (const TensorList list : {weights, lora_As, lora_Bs, TensorList(hiddens), seeds}) {
      saved.insert(saved.end(), list.begin(), list.end());
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["scalings"] = scalings.vec();
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->saved_data["bias_of"] = bias_of;
    ctx->set_materialize_grads(false);
    return ys;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto scalings = ctx->saved_data["scalings"].toDoubleVector();
    const double dropout_p = ctx->saved_data["dropout_p"].toDouble();
    const size_t n = scalings.size();
    size_t at = 1;
    const Tensor& x = saved[0];
    const variable_list weights = take(saved, n, at), lora_As = take(saved, n, at);
    const variable_list lora_Bs = take(saved, n, at), hiddens = take(saved, n, at);
    const variable_list seeds = take(saved, saved.size() - at, at);
    const auto bias_of = ctx->saved_data["bias_of"].toIntVector();
    const auto biases =
        n - static_cast<size_t>(std::count(bias_of.begin(), bias_of.end(), int64_t(-1)));
    // What apply() got: needs_input_grad counts tensors alone, the result everything.
    const size_t edges_A = 1 + n + biases, edges_B = edges_A + n;
    const size_t at_A = edges_A + 1, at_B = edges_B + 1;
    variable_list result(at_B + n + seeds.size() + 2);
    const bool needs_x = ctx->needs_input_grad(0);
    std::vector<size_t> members;  // whose output anything depends on
    bool needs_factors = false;
    for (size_t i = 0; i < n; ++i) {
      if (grads[i].defined()) {
        members.push_back(i);
        needs_factors |= ctx->needs_input_grad(edges_A + i) || ctx->needs_input_grad(edges_B + i);
      }
    }
    if (members.empty()) {
      return result;
    }
    if (at::GradMode::is_enabled()) {
      for (const size_t i : members) {
        const auto exact =
            differentiable_lora_linear_backward(grads[i], x, weights[i], lora_As[i], lora_Bs[i],
                                                scalings[i], dropout_p, seed_of(seeds, i));
        result[0] = result[0].defined() ? result[0] + exact[0] : exact[0];
        result[at_A + i] = exact[1];
        result[at_B + i] = exact[2];
      }
    } else if (needs_x || needs_factors) {
      variable_list g, w, a, b, h, s;
      std::vector<double> scales;
      for (const size_t i : members) {
        g.push_back(grads[i]);
        w.push_back(weights[i]);
        a.push_back(lora_As[i]);
        b.push_back(lora_Bs[i]);
        h.push_back(hiddens[i]);
        scales.push_back(scalings[i]);
        if (const auto seed = seed_of(seeds, i)) {
          s.push_back(*seed);
        }
      }
      static const auto backward_op = find<BackwardSchema>("gauge_ext::lora_linear_group_backward");
      const auto [grad_x, grad_As, grad_Bs] =
          backward_op.call(g, x, w, a, b, h, scales, dropout_p, s, needs_x, needs_factors);
      result[0] = needs_x ? grad_x : Tensor();
      for (size_t k = 0; needs_factors && k < members.size(); ++k) {
        result[at_A + members[k]] = grad_As[k];
        result[at_B + members[k]] = grad_Bs[k];
      }
    }
    for (const size_t i : members) {
      if (ctx->needs_input_grad(1 + i)) {
        result[1 + i] = grad_weight(grads[i], x, weights[i]);
      }
      if (bias_of[i] >= 0) {
        const size_t place = 1 + n + static_cast<size_t>(bias_of[i]);
        result[place] = ctx->needs_input_grad(place) ? grad_bias(grads[i], weights[i]) : Tensor();
      }
    }
    return result;
  }
};

std::vector<Tensor> group_autograd(const Tensor& x,
                                   TensorList weights,
                                   const OptionalTensors& biases,
                                   TensorList lora_As,
                                   TensorList lora_Bs,
                                   Scalings scalings,
                                   double dropout_p,
                                   TensorList seeds) {
  check_group_lengths(weights, biases.size(), lora_As, lora_Bs, scalings, dropout_p, seeds);
  variable_list present;
  std::vector<int64_t> bias_of;
  for (const OptionalTensor& bias : biases) {
    bias_of.push_back(bias.has_value() ? static_cast<int64_t>(present.size()) : -1);
    if (bias.has_value()) {
      present.push_back(*bias);
    }
  }
  bool transformed = is_transformed(x), requires_grad = x.requires_grad();
  for (const TensorList list : {weights, TensorList(present), lora_As, lora_Bs}) {
    for (const Tensor& tensor : list) {
      transformed |= is_transformed(tensor);
      requires_grad |= tensor.requires_grad();
    }
  }
  // A device without kernels for a whole group takes it member by member.
  static const auto group_op = find<GroupSchema>("gauge_ext::lora_linear_group");
  const bool has_kernels =
      x.is_cpu() || x.is_meta() ||
      (x.is_cuda() && group_op.hasKernelForDispatchKey(c10::DispatchKey::CUDA));
  if (transformed || !has_kernels) {
    return group_composite(x, weights, biases, lora_As, lora_Bs, scalings, dropout_p, seeds);
  }
  if (at::GradMode::is_enabled() && requires_grad) {
    return LoraLinearGroupFunction::apply(x, weights, TensorList(present), bias_of, lora_As,
                                          lora_Bs, seeds, scalings, dropout_p);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return group_op.call(x, weights, biases, lora_As, lora_Bs, scalings, dropout_p, seeds);
}

std::vector<Tensor> group_autocast(const Tensor& x,
                                   TensorList weights,
                                   const OptionalTensors& biases,
                                   TensorList lora_As,
                                   TensorList lora_Bs,
                                   Scalings scalings,
                                   double dropout_p,
                                   TensorList seeds) {
  static const auto group = find<GroupSchema>("gauge_ext::lora_linear_group");
  const Autocast cast(x);
  std::vector<Tensor> cast_weights;
  for (const Tensor& weight : weights) {
    cast_weights.push_back(cast(weight));
  }
  OptionalTensors cast_biases;
  for (const OptionalTensor& bias : biases) {
    cast_biases.push_back(cast(bias));
  }
  return group.call(cast(x), cast_weights, cast_biases, lora_As, lora_Bs, scalings, dropout_p,
                    seeds);
}

}  // namespace

TORCH_LIBRARY_IMPL(gauge_ext, Autograd, m) {
  m.impl("lora_linear_group", &group_autograd);
}

TORCH_LIBRARY_IMPL(gauge_ext, AutocastCPU, m) {
  m.impl("lora_linear_group", &group_autocast);
}

TORCH_LIBRARY_IMPL(gauge_ext, AutocastCUDA, m) {
  m.impl("lora_linear_group", &group_autocast);
}

// torch.vmap sees the members, and of them the parts.
TORCH_LIBRARY_IMPL(gauge_ext, FuncTorchBatched, m) {
  m.impl("lora_linear_group", &group_composite);
}

}  // namespace gauge_ext
