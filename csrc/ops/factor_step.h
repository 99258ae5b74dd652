#pragma once

// The steps of the gauge-invariant optimizers over all layers at once. factor_step.cpp holds the
// schemas and the checks, ops/cpu/factor_step.h the formulas.

#include <ATen/core/Tensor.h>

namespace gauge_ext {

// Checks the factors of all layers and their gradients.
void check_factors(at::TensorList lora_A,
                   at::TensorList lora_B,
                   at::TensorList grad_A,
                   at::TensorList grad_B,
                   at::ArrayRef<double> scaling,
                   at::IntArrayRef anchors,
                   double damping);

}  // namespace gauge_ext
