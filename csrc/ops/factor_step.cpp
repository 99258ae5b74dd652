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

at::ScalarType state_dtype(TensorList factors) {
  return factors[0].scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The state of one kind for all layers, of shape(i) each
template <typename F>
void check_state(TensorList state,
                 TensorList factors,
                 const char* name,
                 at::ScalarType dtype,
                 const F& shape) {
  TORCH_CHECK(state.size() == factors.size(), name, " must have ", factors.size(),
              " entries, one for each pair, got ", state.size());
  for (size_t i = 0; i < state.size(); ++i) {
    const std::vector<int64_t> expected = shape(factors[i]);
    TORCH_CHECK(state[i].sizes() == at::IntArrayRef(expected) && state[i].scalar_type() == dtype &&
                    state[i].device() == factors[i].device() && state[i].is_contiguous(),
                name, "[", i, "] must be contiguous, of shape ", at::IntArrayRef(expected), " and ",
                dtype, ", got ", state[i].sizes(), " and ", state[i].scalar_type());
  }
}

std::vector<int64_t> whole(const Tensor& factor) {
  return factor.sizes().vec();
}
std::vector<int64_t> turned(const Tensor& factor) {
  return {factor.size(1), factor.size(0)};
}

// Averages of gradients, of the factors' shapes
void check_averages(const FactorCall& call) {
  const auto dtype = state_dtype(call.lora_A);
  check_state(call.avg_A, call.lora_A, "avg_A", dtype, whole);
  check_state(call.avg_B, call.lora_B, "avg_B", dtype, whole);
}

// √(1 - lr · weight_decay), which each factor is multiplied by
double kept(double lr, double weight_decay) {
  const double left = 1.0 - lr * weight_decay;
  TORCH_CHECK(left >= 0, "lr * weight_decay must be at most 1, got ", lr * weight_decay);
  return std::sqrt(left);
}

void check_steps(at::IntArrayRef steps, TensorList factors) {
  TORCH_CHECK(steps.size() == factors.size(), "steps must have ", factors.size(),
              " entries, one for each pair, got ", steps.size());
}

std::vector<FactorStep> adam_steps(at::IntArrayRef steps,
                                   double lr,
                                   double beta1,
                                   double beta2,
                                   double eps,
                                   double weight_decay,
                                   double grad_scale) {
  const double keep = kept(lr, weight_decay);
  std::vector<FactorStep> each;
  for (const int64_t count : steps) {
    const auto t = static_cast<double>(count);
    each.push_back({lr, keep, grad_scale, beta1, beta2, eps, 1 - std::pow(beta1, t),
                    1 - std::pow(beta2, t), false});
  }
  return each;
}

void register_lora_rite(torch::Library& m, const FactorStepDevice& device) {
  m.impl(
      "lora_rite_step",
      [device](TensorList lora_A, TensorList lora_B, TensorList grad_A, TensorList grad_B,
               TensorList frame_A, TensorList frame_B, TensorList avg_A, TensorList avg_B,
               TensorList sq_A, TensorList sq_B, TensorList rest, Scalings scaling,
               at::IntArrayRef anchors, at::IntArrayRef steps, double lr, double beta1,
               double beta2, double eps, double weight_decay, double damping, double grad_scale) {
        const FactorCall call = {lora_A, lora_B, grad_A, grad_B,  scaling, anchors, damping, avg_A,
                                 avg_B,  {},     {},     frame_A, frame_B, sq_A,    sq_B,    rest};
        check_factors(call);
        check_steps(steps, lora_A);
        if (lora_A.empty()) {
          return;
        }
        const auto dtype = state_dtype(lora_A);
        const auto square = [](const Tensor& A) { return std::vector<int64_t>(2, A.size(0)); };
        check_state(frame_A, lora_A, "frame_A", dtype, whole);
        check_state(frame_B, lora_B, "frame_B", dtype, turned);
        check_state(avg_A, lora_A, "avg_A", dtype, whole);
        check_state(avg_B, lora_B, "avg_B", dtype, turned);
        check_state(sq_A, lora_A, "sq_A", at::kDouble, square);
        check_state(sq_B, lora_A, "sq_B", at::kDouble, square);
        check_state(rest, lora_A, "rest", at::kDouble, square);
        device.lora_rite(call, adam_steps(steps, lr, beta1, beta2, eps, weight_decay, grad_scale));
      });
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
             check_averages(call);
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
           check_steps(steps, lora_A);
           if (lora_A.empty()) {
             return;
           }
           check_averages(call);
           const auto dtype = state_dtype(lora_A);
           check_state(sq_A, lora_A, "sq_A", dtype,
                       [](const Tensor& A) { return std::vector<int64_t>{A.size(1)}; });
           check_state(sq_B, lora_B, "sq_B", dtype,
                       [](const Tensor& B) { return std::vector<int64_t>{B.size(0)}; });
           device.step(call, StepRule::kGaugeAdam,
                       adam_steps(steps, lr, beta1, beta2, eps, weight_decay, grad_scale));
         });
  if (device.lora_rite != nullptr) {
    register_lora_rite(m, device);
  }
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
  m.def(
      "lora_rite_step(Tensor(a!)[] lora_A, Tensor(b!)[] lora_B, Tensor[] grad_A, Tensor[] grad_B, "
      "Tensor(c!)[] frame_A, Tensor(d!)[] frame_B, Tensor(e!)[] avg_A, Tensor(f!)[] avg_B, "
      "Tensor(g!)[] sq_A, Tensor(h!)[] sq_B, Tensor(i!)[] rest, float[] scaling, int[] anchors, "
      "int[] steps, float lr, float beta1, float beta2, float eps, float weight_decay, "
      "float damping, float grad_scale=1.0) -> ()",
      tags);
  // The squared length of all gradients together, () float64.
  m.def(
      "factor_gradient_norm(Tensor[] lora_A, Tensor[] lora_B, Tensor[] grad_A, Tensor[] grad_B, "
      "float[] scaling, int[] anchors, float damping) -> Tensor",
      tags);
}

}  // namespace gauge_ext
