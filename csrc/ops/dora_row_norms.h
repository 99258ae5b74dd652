#pragma once

// dora_row_norms: ‖(W + s·B A)_i‖ of each row i, which DoRA divides its magnitudes by. They are
// constants to the backward pass (arXiv:2402.09353, section 4.3), so the op has no gradient.
// dora_row_norms.cpp holds the schema and the checks, dora_row_norms_formula.cpp the same in plain
// ATen for torch.func; the CPU provides the op under the dispatcher.

#include <cstdint>

#include <ATen/core/Tensor.h>

namespace gauge_ext {

struct RowNormSizes {
  int64_t out_features;
  int64_t in_features;
  int64_t rank;
};

// Checks every argument of dora_row_norms and returns the sizes.
RowNormSizes check_dora_row_norms(const at::Tensor& weight,
                                  const at::Tensor& lora_A,
                                  const at::Tensor& lora_B);

// What the norms are computed and returned in: float32, or float64 where a tensor is.
at::ScalarType row_norm_dtype(const at::Tensor& weight,
                              const at::Tensor& lora_A,
                              const at::Tensor& lora_B);

}  // namespace gauge_ext
