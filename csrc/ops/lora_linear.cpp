#include "ops/lora_linear.h"

#include <torch/library.h>

#include "check.h"
#include "ops/rows.h"

namespace gauge_ext {

LoraLinearSizes check_lora_linear(const at::Tensor& x,
                                  const at::Tensor& weight,
                                  const std::optional<at::Tensor>& bias,
                                  const at::Tensor& lora_A,
                                  const at::Tensor& lora_B,
                                  double dropout_p,
                                  const std::optional<at::Tensor>& seed) {
  check_base(x, weight, bias);
  const int64_t out_features = weight.size(0), in_features = weight.size(1);
  TORCH_CHECK(lora_A.dim() == 2, "lora_A must have shape [r, in], got ", lora_A.sizes());
  const int64_t rank = lora_A.size(0);
  check_matrix(lora_A, "lora_A", "[r, in]", rank, in_features);
  check_matrix(lora_B, "lora_B", "[out, r]", out_features, rank);
  check_same_device(lora_A, "lora_A", x);
  check_same_device(lora_B, "lora_B", x);
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

}  // namespace gauge_ext
