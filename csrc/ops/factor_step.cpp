#include "ops/factor_step.h"

#include <cmath>
#include <vector>

#include <torch/library.h>

namespace gauge_ext {
namespace {

using at::Tensor;
using at::TensorList;
using Scalings = at::ArrayRef<double>;

void check_pair(TensorList lora_A, TensorList lora_B, size_t i) {
  const Tensor &a = lora_A[i], &b = lora_B[i];
  TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(0) == b.size(1) && a.size(0) > 0, "lora_A[", i,
              "] and lora_B[", i, "] must have shapes [r, in] and [out, r] with r >= 1, got ",
              a.sizes(), " and ", b.sizes());
  for (const Tensor* factor : {&a, &b}) {
    TORCH_CHECK(factor->is_contiguous(), "the factors of pair ", i,
                " must be contiguous; pass a contiguous copy");
    TORCH_CHECK(
        factor->scalar_type() == lora_A[0].scalar_type() && factor->device() == lora_A[0].device(),
        "all factors must have the dtype and the device of lora_A[0], ", lora_A[0].scalar_type(),
        " on ", lora_A[0].device(), ", got ", factor->scalar_type(), " on ", factor->device(),
        " in pair ", i);
  }
}

void check_gradients(TensorList grads, TensorList factors, const char* name) {
  for (size_t i = 0; i < factors.size(); ++i) {
    const Tensor &grad = grads[i], &factor = factors[i];
    TORCH_CHECK(grad.sizes() == factor.sizes() && grad.scalar_type() == factor.scalar_type() &&
                    grad.device() == factor.device() && grad.is_contiguous(),
                name, "[", i,
                "] must be contiguous and have its factor's shape, dtype and device, ",
                factor.sizes(), " ", factor.scalar_type(), " on ", factor.device(), ", got ",
                grad.sizes(), " ", grad.scalar_type(), " on ", grad.device());
  }
}

// Checks the factors of all layers and their gradients.
void check_factors(const FactorCall& call) {
  const size_t count = call.lora_A.size();
  TORCH_CHECK(call.lora_B.size() == count && call.grad_A.size() == count &&
                  call.grad_B.size() == count && call.scaling.size() == count &&
                  call.anchors.size() == count,
              "lora_A, lora_B, grad_A, grad_B, scaling and anchors must have one entry for each "
              "pair, got ",
              count, ", ", call.lora_B.size(), ", ", call.grad_A.size(), ", ", call.grad_B.size(),
              ", ", call.scaling.size(), " and ", call.anchors.size());
  TORCH_CHECK(call.damping >= 0, "damping must be at least 0, got ", call.damping);
  for (size_t i = 0; i < count; ++i) {
    check_pair(call.lora_A, call.lora_B, i);
    TORCH_CHECK(std::isfinite(call.scaling[i]) && call.scaling[i] != 0, "scaling[", i,
                "] must be finite and not 0, got ", call.scaling[i]);
    TORCH_CHECK(call.anchors[i] == 0 || call.anchors[i] == 1, "anchors[", i,
                "] must be 0 (lora_A) or 1 (lora_B), got ", call.anchors[i]);
  }
  check_gradients(call.grad_A, call.lora_A, "grad_A");
  check_gradients(call.grad_B, call.lora_B, "grad_B");
}

// The state of one kind for all layers
void check_state(TensorList state,
                 TensorList factors,
                 const char* name,
                 int64_t numbers_along) {  // the dimension that there is one number for, or -1: all
  TORCH_CHECK(state.size() == factors.size(), name, " must have ", factors.size(),
              " entries, one for each pair, got ", state.size());
  const auto dtype = factors[0].scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  for (size_t i = 0; i < state.size(); ++i) {
    const auto shape =
        numbers_along < 0 ? factors[i].sizes() : factors[i].sizes().slice(numbers_along, 1);
    TORCH_CHECK(state[i].sizes() == shape && state[i].scalar_type() == dtype &&
                    state[i].device() == factors[i].device() && state[i].is_contiguous(),
                name, "[", i, "] must be contiguous, of shape ", shape, " and ", dtype, ", got ",
                state[i].sizes(), " and ", state[i].scalar_type());
  }
}

// √(1 - lr · weight_decay), which each factor is multiplied by
double kept(double lr, double weight_decay) {
  const double left = 1.0 - lr * weight_decay;
  TORCH_CHECK(left >= 0, "lr * weight_decay must be at most 1, got ", lr * weight_decay);
  return std::sqrt(left);
}

}  // namespace

void register_factor_steps(torch::Library& m, const FactorStepDevice& device) {
  m.impl("scaled_gd_step",
         [device](TensorList lora_A, TensorList lora_B, TensorList grad_A, TensorList grad_B,
                  TensorList avg_A, TensorList avg_B, Scalings scaling, at::IntArrayRef anchors,
                  double lr, double momentum, bool nesterov, double weight_decay, double damping,
                  double grad_scale) {
           const FactorCall call = {lora_A,  lora_B, grad_A, grad_B, scaling, anchors,
                                    damping, avg_A,  avg_B,  {},     {}};
           check_factors(call);
           if (lora_A.empty()) {
             return;
           }
           if (momentum != 0 || !avg_A.empty()) {
             check_state(avg_A, lora_A, "avg_A", -1);
             check_state(avg_B, lora_B, "avg_B", -1);
           }
           const FactorStep step = {
               lr, kept(lr, weight_decay), grad_scale, momentum, 0, 0, 1, 1, nesterov};
           device.step(call, StepRule::kScaledGd, std::vector<FactorStep>(lora_A.size(), step));
         });
  m.impl("gauge_adam_step",
         [device](TensorList lora_A, TensorList lora_B, TensorList grad_A, TensorList grad_B,
                  TensorList avg_A, TensorList avg_B, TensorList sq_A, TensorList sq_B,
                  Scalings scaling, at::IntArrayRef anchors, at::IntArrayRef steps, double lr,
                  double beta1, double beta2, double eps, double weight_decay, double damping,
                  double grad_scale) {
           const FactorCall call = {lora_A,  lora_B, grad_A, grad_B, scaling, anchors,
                                    damping, avg_A,  avg_B,  sq_A,   sq_B};
           check_factors(call);
           TORCH_CHECK(steps.size() == lora_A.size(), "steps must have ", lora_A.size(),
                       " entries, one for each pair, got ", steps.size());
           if (lora_A.empty()) {
             return;
           }
           check_state(avg_A, lora_A, "avg_A", -1);
           check_state(avg_B, lora_B, "avg_B", -1);
           check_state(sq_A, lora_A, "sq_A", 1);
           check_state(sq_B, lora_B, "sq_B", 0);
           const double keep = kept(lr, weight_decay);
           std::vector<FactorStep> each;
           for (const int64_t count : steps) {
             const auto t = static_cast<double>(count);
             each.push_back({lr, keep, grad_scale, beta1, beta2, eps, 1 - std::pow(beta1, t),
                             1 - std::pow(beta2, t), false});
           }
           device.step(call, StepRule::kGaugeAdam, each);
         });
  m.impl("factor_gradient_norm",
         [device](TensorList lora_A, TensorList lora_B, TensorList grad_A, TensorList grad_B,
                  Scalings scaling, at::IntArrayRef anchors, double damping) {
           const FactorCall call = {lora_A,  lora_B, grad_A, grad_B, scaling, anchors,
                                    damping, {},     {},     {},     {}};
           check_factors(call);
           TORCH_CHECK(!lora_A.empty(), "lora_A must have an entry, got an empty list");
           return device.gradient_norm(call);
         });
}

TORCH_LIBRARY_FRAGMENT(gauge_ext, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  // avg_A and avg_B are empty lists without momentum; an anchor is 0 for lora_A and 1 for lora_B.
  m.def(
      "scaled_gd_step(Tensor(a!)[] lora_A, Tensor(b!)[] lora_B, Tensor[] grad_A, Tensor[] grad_B, "
      "Tensor(c!)[] avg_A, Tensor(d!)[] avg_B, float[] scaling, int[] anchors, float lr, "
      "float momentum, "
      "bool nesterov, float weight_decay, float damping, float grad_scale=1.0) -> ()",
      tags);
  m.def(
      "gauge_adam_step(Tensor(a!)[] lora_A, Tensor(b!)[] lora_B, Tensor[] grad_A, Tensor[] grad_B, "
      "Tensor(c!)[] avg_A, Tensor(d!)[] avg_B, Tensor(e!)[] sq_A, Tensor(f!)[] sq_B, "
      "float[] scaling, int[] anchors, int[] steps, float lr, float beta1, float beta2, float eps, "
      "float weight_decay, float damping, float grad_scale=1.0) -> ()",
      tags);
  // The squared length of all gradients together, () float64.
  m.def(
      "factor_gradient_norm(Tensor[] lora_A, Tensor[] lora_B, Tensor[] grad_A, Tensor[] grad_B, "
      "float[] scaling, int[] anchors, float damping) -> Tensor",
      tags);
}

}  // namespace gauge_ext
