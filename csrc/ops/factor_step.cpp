#include "ops/factor_step.h"

#include <cmath>
#include <vector>

#include <torch/library.h>

namespace gauge_ext {
namespace {

void check_pair(at::TensorList lora_A, at::TensorList lora_B, size_t i) {
  const at::Tensor &a = lora_A[i], &b = lora_B[i];
  TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(0) == b.size(1) && a.size(0) > 0, "lora_A[", i,
              "] and lora_B[", i, "] must have shapes [r, in] and [out, r] with r >= 1, got ",
              a.sizes(), " and ", b.sizes());
  for (const at::Tensor* factor : {&a, &b}) {
    TORCH_CHECK(factor->is_contiguous(), "the factors of pair ", i,
                " must be contiguous; pass a contiguous copy");
    TORCH_CHECK(
        factor->scalar_type() == lora_A[0].scalar_type() && factor->device() == lora_A[0].device(),
        "all factors must have the dtype and the device of lora_A[0], ", lora_A[0].scalar_type(),
        " on ", lora_A[0].device(), ", got ", factor->scalar_type(), " on ", factor->device(),
        " in pair ", i);
  }
}

void check_gradients(at::TensorList grads, at::TensorList factors, const char* name) {
  for (size_t i = 0; i < factors.size(); ++i) {
    const at::Tensor &grad = grads[i], &factor = factors[i];
    TORCH_CHECK(grad.sizes() == factor.sizes() && grad.scalar_type() == factor.scalar_type() &&
                    grad.device() == factor.device() && grad.is_contiguous(),
                name, "[", i,
                "] must be contiguous and have its factor's shape, dtype and device, ",
                factor.sizes(), " ", factor.scalar_type(), " on ", factor.device(), ", got ",
                grad.sizes(), " ", grad.scalar_type(), " on ", grad.device());
  }
}

}  // namespace

void check_factors(at::TensorList lora_A,
                   at::TensorList lora_B,
                   at::TensorList grad_A,
                   at::TensorList grad_B,
                   at::ArrayRef<double> scaling,
                   at::IntArrayRef anchors,
                   double damping) {
  const size_t count = lora_A.size();
  TORCH_CHECK(lora_B.size() == count && grad_A.size() == count && grad_B.size() == count &&
                  scaling.size() == count && anchors.size() == count,
              "lora_A, lora_B, grad_A, grad_B, scaling and anchors must have one entry for each "
              "pair, got ",
              count, ", ", lora_B.size(), ", ", grad_A.size(), ", ", grad_B.size(), ", ",
              scaling.size(), " and ", anchors.size());
  TORCH_CHECK(damping >= 0, "damping must be at least 0, got ", damping);
  for (size_t i = 0; i < count; ++i) {
    check_pair(lora_A, lora_B, i);
    TORCH_CHECK(std::isfinite(scaling[i]) && scaling[i] != 0, "scaling[", i,
                "] must be finite and not 0, got ", scaling[i]);
    TORCH_CHECK(anchors[i] == 0 || anchors[i] == 1, "anchors[", i,
                "] must be 0 (lora_A) or 1 (lora_B), got ", anchors[i]);
  }
  check_gradients(grad_A, lora_A, "grad_A");
  check_gradients(grad_B, lora_B, "grad_B");
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
