#pragma once

// lora_linear_group: several adapted layers that read one x. Same formula as lora_linear for each.

#include <cstddef>
#include <optional>
#include <vector>

#include <ATen/core/Tensor.h>

namespace gauge_ext {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

// Fails unless the lists have one entry a member and the seeds are none, one for all or one each.
void check_lora_linear_group(at::TensorList weights,
                             size_t biases,
                             at::TensorList lora_As,
                             at::TensorList lora_Bs,
                             at::ArrayRef<double> scalings,
                             double dropout_p,
                             at::TensorList seeds);

// The seed of a member, if there are any.
std::optional<at::Tensor> seed_of(at::TensorList seeds, size_t member);

}  // namespace gauge_ext
