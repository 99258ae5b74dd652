#pragma once

// lora_linear_group: several adapted layers that read one x. Same formula as lora_linear for each.
// lora_linear_group.cpp holds the schema and the checks, lora_linear_group_formula.cpp the autograd
// formula and the same member by member.

#include <cstddef>
#include <optional>
#include <vector>

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include "ops/lora_linear.h"

namespace gauge_ext {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

// Fails unless the lists have one entry a member and the seeds are none, one for all or one each.
void check_group_lengths(at::TensorList weights,
                         size_t biases,
                         at::TensorList lora_As,
                         at::TensorList lora_Bs,
                         at::ArrayRef<double> scalings,
                         double dropout_p,
                         at::TensorList seeds);

// Checks every argument of lora_linear_group, `biases` being null in the backward pass, and returns
// the sizes of each member.
std::vector<LoraLinearSizes> check_lora_linear_group(const at::Tensor& x,
                                                     at::TensorList weights,
                                                     const OptionalTensors* biases,
                                                     at::TensorList lora_As,
                                                     at::TensorList lora_Bs,
                                                     at::ArrayRef<double> scalings,
                                                     double dropout_p,
                                                     at::TensorList seeds);

// Checks what the backward pass gets besides.
void check_lora_linear_group_grads(at::TensorList grads,
                                   at::TensorList hiddens,
                                   const at::Tensor& x,
                                   const std::vector<LoraLinearSizes>& sizes);

// The seed of a member, if there are any.
std::optional<at::Tensor> seed_of(at::TensorList seeds, size_t member);

}  // namespace gauge_ext
