#pragma once

// x as rows: its batch dimensions folded into one, and what else has them.

#include <vector>

#include <ATen/core/Tensor.h>

#include "check.h"

namespace gauge_ext {

// (rows, columns), contiguous
inline at::Tensor rows_of(const at::Tensor& tensor, int64_t rows, int64_t columns) {
  return tensor.contiguous().view({rows, columns});
}

// x's batch dimensions with out_features behind them
inline std::vector<int64_t> output_shape(const at::Tensor& x, int64_t out_features) {
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = out_features;
  return shape;
}

// Fails unless `grad` can be the gradient of an output with x's batch dimensions, `rows` in all.
inline void check_grad(const at::Tensor& grad,
                       const char* name,
                       const at::Tensor& x,
                       int64_t rows,
                       int64_t out_features) {
  TORCH_CHECK(
      grad.dim() == x.dim() && grad.size(-1) == out_features && grad.numel() == rows * out_features,
      name, " must have shape [*batch, out] = [*, ", out_features, "] to fit x ", x.sizes(),
      ", got ", grad.sizes());
  check_same_dtype(grad, name, x);
}

// Fails unless the frozen layer y = x Wᵀ + b fits x: weight [out, in], bias [out] or none.
inline void check_base(const at::Tensor& x,
                       const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(weight.dim() == 2, "weight must have shape [out, in], got ", weight.sizes());
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == weight.size(1), "x must have shape [*batch, in] = [*, ",
              weight.size(1), "] to fit weight ", weight.sizes(), ", got ", x.sizes());
  check_same_dtype(weight, "weight", x);
  check_same_device(weight, "weight", x);
  if (bias.has_value()) {
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0),
                "bias must have shape [out] = [", weight.size(0), "], got ", bias->sizes());
    check_same_dtype(*bias, "bias", x);
    check_same_device(*bias, "bias", x);
  }
}

}  // namespace gauge_ext
