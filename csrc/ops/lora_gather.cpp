#include "ops/lora_gather.h"

#include <algorithm>
#include <string>
#include <vector>

#include <torch/library.h>

#include "check.h"
#include "ops/rows.h"

namespace gauge_ext {

LoraGatherSizes check_lora_gather(const at::Tensor& x,
                                  const at::Tensor& weight,
                                  const std::optional<at::Tensor>& bias,
                                  at::TensorList lora_A,
                                  at::TensorList lora_B,
                                  at::ArrayRef<double> scaling,
                                  const at::Tensor& index) {
  check_base(x, weight, bias);
  const int64_t out_features = weight.size(0), in_features = weight.size(1);
  TORCH_CHECK(lora_B.size() == lora_A.size(), "lora_B must have one entry for each of the ",
              lora_A.size(), " in lora_A, got ", lora_B.size());
  TORCH_CHECK(scaling.size() == lora_A.size(), "scaling must have one entry for each of the ",
              lora_A.size(), " in lora_A, got ", scaling.size());
  for (size_t i = 0; i < lora_A.size(); ++i) {
    const auto named = [&](const char* name) { return name + ("[" + std::to_string(i) + "]"); };
    const at::Tensor &a = lora_A[i], &b = lora_B[i];
    TORCH_CHECK(a.dim() == 2 && a.size(1) == in_features, named("lora_A"),
                " must have shape [r, in] = [*, ", in_features, "], got ", a.sizes());
    TORCH_CHECK(b.dim() == 2 && b.size(0) == out_features && b.size(1) == a.size(0),
                named("lora_B"), " must have shape [out, r] = [", out_features, ", ", a.size(0),
                "], got ", b.sizes());
    TORCH_CHECK(a.scalar_type() == x.scalar_type() || a.scalar_type() == at::kFloat,
                named("lora_A"), " must have x's dtype, ", x.scalar_type(), ", or float32, got ",
                a.scalar_type());
    TORCH_CHECK(a.scalar_type() == lora_A[0].scalar_type() && b.scalar_type() == a.scalar_type(),
                named("lora_A"), " and ", named("lora_B"), " must have lora_A[0]'s dtype, ",
                lora_A[0].scalar_type(), ", got ", a.scalar_type(), " and ", b.scalar_type());
    TORCH_CHECK(a.device() == x.device() && b.device() == x.device(), named("lora_A"), " and ",
                named("lora_B"), " must be on x's device, ", x.device(), ", got ", a.device(),
                " and ", b.device());
  }
  TORCH_CHECK(index.scalar_type() == at::kLong, "index must be int64, got ", index.scalar_type());
  const auto batch = x.sizes().slice(0, x.dim() - 1);
  TORCH_CHECK(index.dim() <= static_cast<int64_t>(batch.size()) &&
                  batch.slice(0, index.dim()).equals(index.sizes()),
              "index must have the first batch dimensions of x, [*batch, in] = ", x.sizes(),
              ", got ", index.sizes());
  int64_t rows = 1;
  for (const auto size : batch) {
    rows *= size;
  }
  return {rows, rows / std::max<int64_t>(index.numel(), 1), in_features, out_features};
}

void check_entries(at::ArrayRef<int64_t> index, int64_t adapters) {
  for (const int64_t entry : index) {
    TORCH_CHECK(entry >= -1 && entry < adapters, "index must be in [-1, ", adapters, ") for ",
                adapters, " adapters, got ", entry);
  }
}

TORCH_LIBRARY_FRAGMENT(gauge_ext, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "lora_gather(Tensor x, Tensor weight, Tensor? bias, Tensor[] lora_A, Tensor[] lora_B, "
      "float[] scaling, Tensor index) -> Tensor",
      tags);
  // (grad_x, grads_A, grads_B); those that are not wanted come back with no elements.
  m.def(
      "lora_gather_backward(Tensor grad, Tensor x, Tensor weight, Tensor[] lora_A, "
      "Tensor[] lora_B, float[] scaling, Tensor index, bool needs_x, bool needs_factors) -> "
      "(Tensor, Tensor[], Tensor[])",
      tags);
}

}  // namespace gauge_ext
