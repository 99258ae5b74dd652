#pragma once

// lora_linear: y = x Wᵀ + b + s·(x ∘ M) Aᵀ Bᵀ, where M is the multiplier of inverted dropout.
// Each device provides forward, backward and mask under the dispatcher; lora_linear.cpp holds the
// schema and the checks, lora_linear_formula.cpp the autograd formula and the same in plain ATen.

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include <ATen/core/Tensor.h>

namespace gauge_ext {

// The op itself: x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed.
using LoraLinearSchema = at::Tensor(const at::Tensor&,
                                    const at::Tensor&,
                                    const std::optional<at::Tensor>&,
                                    const at::Tensor&,
                                    const at::Tensor&,
                                    double,
                                    double,
                                    const std::optional<at::Tensor>&);

// What a kernel needs of a call, once the shapes are checked and the batch dimensions folded.
struct LoraLinearSizes {
  int64_t rows;          // N, the product of x's batch dimensions
  int64_t in_features;   // K
  int64_t out_features;  // M
  int64_t rank;          // r
};

// Checks every argument of lora_linear and returns the sizes.
LoraLinearSizes check_lora_linear(const at::Tensor& x,
                                  const at::Tensor& weight,
                                  const std::optional<at::Tensor>& bias,
                                  const at::Tensor& lora_A,
                                  const at::Tensor& lora_B,
                                  double dropout_p,
                                  const std::optional<at::Tensor>& seed);

// The gradients of x, lora_A and lora_B in ATen: backward under create_graph, hence differentiable.
std::vector<at::Tensor> differentiable_lora_linear_backward(const at::Tensor& grad,
                                                            const at::Tensor& x,
                                                            const at::Tensor& weight,
                                                            const at::Tensor& lora_A,
                                                            const at::Tensor& lora_B,
                                                            double scaling,
                                                            double dropout_p,
                                                            const std::optional<at::Tensor>& seed);

}  // namespace gauge_ext
