#include "ops/dora_row_norms.h"

#include <vector>

#include <torch/library.h>

#include "check.h"

namespace gauge_ext {

RowNormSizes check_dora_row_norms(const at::Tensor& weight,
                                  const at::Tensor& lora_A,
                                  const at::Tensor& lora_B) {
  TORCH_CHECK(weight.dim() == 2, "weight must have shape [out, in], got ", weight.sizes(),
              "; of a convolution's weight, pass weight.flatten(1)");
  TORCH_CHECK(weight.is_floating_point(), "weight must be floating-point, got ",
              weight.scalar_type());
  const int64_t out_features = weight.size(0), in_features = weight.size(1);
  TORCH_CHECK(lora_A.dim() == 2 && lora_A.size(1) == in_features,
              "lora_A must have shape [r, in] = [*, ", in_features, "], got ", lora_A.sizes());
  const int64_t rank = lora_A.size(0);
  check_matrix(lora_B, "lora_B", "[out, r]", out_features, rank);
  for (const auto* factor : {&lora_A, &lora_B}) {
    const char* name = factor == &lora_A ? "lora_A" : "lora_B";
    TORCH_CHECK(factor->is_floating_point(), name, " must be floating-point, got ",
                factor->scalar_type());
    TORCH_CHECK(factor->device() == weight.device(), name, " must be on weight's device, ",
                weight.device(), ", got ", factor->device());
  }
  return {out_features, in_features, rank};
}

at::ScalarType row_norm_dtype(const at::Tensor& weight,
                              const at::Tensor& lora_A,
                              const at::Tensor& lora_B) {
  const bool wide = weight.scalar_type() == at::kDouble || lora_A.scalar_type() == at::kDouble ||
                    lora_B.scalar_type() == at::kDouble;
  return wide ? at::kDouble : at::kFloat;
}

TORCH_LIBRARY_FRAGMENT(gauge_ext, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("dora_row_norms(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling) -> Tensor",
        tags);
}

}  // namespace gauge_ext
