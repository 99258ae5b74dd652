#pragma once

// lora_gather: y_n = x_n Wᵀ + b + s_i·x_n A_iᵀ B_iᵀ with i = index[n], a different adapter for each
// row or none (-1). lora_gather.cpp holds the schema and the checks, lora_gather_formula.cpp the
// autograd formula and the same in plain ATen; each device provides the op and its backward under
// the dispatcher.

#include <optional>

#include <ATen/core/Tensor.h>

namespace gauge_ext {

struct LoraGatherSizes {
  int64_t rows;          // N, the product of x's batch dimensions
  int64_t rows_each;     // as many neighbouring rows share one entry of index
  int64_t in_features;   // K
  int64_t out_features;  // M
};

// Checks every argument of lora_gather and returns the sizes.
LoraGatherSizes check_lora_gather(const at::Tensor& x,
                                  const at::Tensor& weight,
                                  const std::optional<at::Tensor>& bias,
                                  at::TensorList lora_A,
                                  at::TensorList lora_B,
                                  at::ArrayRef<double> scaling,
                                  const at::Tensor& index);

// Fails unless every entry of an index on the host names one of so many adapters, or none.
void check_entries(at::ArrayRef<int64_t> index, int64_t adapters);

}  // namespace gauge_ext
