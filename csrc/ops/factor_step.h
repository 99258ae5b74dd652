#pragma once

// The steps of the gauge-invariant optimizers over all layers at once. factor_step.cpp holds the
// schemas, the checks and what the ops' arguments make of a step; ops/cpu/factor_step.h the
// formulas. Each device provides one step of checked factors and the length of their gradients.

#include <vector>

#include <ATen/core/Tensor.h>

#include "math/factor_step.h"

namespace torch {
class Library;
}

namespace gauge_ext {

// The arguments of a call: lists with one entry for each pair of factors.
struct FactorCall {
  at::TensorList lora_A, lora_B, grad_A, grad_B;
  at::ArrayRef<double> scaling;
  at::IntArrayRef anchors;  // 0: lora_A, 1: lora_B
  double damping;
  at::TensorList avg_A, avg_B, sq_A, sq_B;  // state; empty where a rule keeps none
  at::TensorList frame_A = {}, frame_B = {}, moment_A = {}, moment_B = {}, rest = {};  // LoRA-RITE
};

struct FactorStepDevice {
  // A step of all pairs, of which there is one at least. The entries of `steps`, one for each pair,
  // differ in Adam's corrections alone.
  void (*step)(const FactorCall& call, StepRule rule, const std::vector<FactorStep>& steps);

  // The squared length of all gradients together, () float64
  at::Tensor (*gradient_norm)(const FactorCall& call);

  // A step of LoRA-RITE; null where the device has none
  void (*lora_rite)(const FactorCall& call, const std::vector<FactorStep>& steps);
};

// Registers the ops for one device.
void register_factor_steps(torch::Library& m, const FactorStepDevice& device);

// What is wrong with a pair that has no invariant step
constexpr const char* kRefusedPair =
    ": lora_A (lora_B where training starts from lora_A = 0) has a rank below r, or a factor holds "
    "NaN or infinity, where the invariant step is undefined. Start with a factor of full rank, "
    "such as attach() draws";

}  // namespace gauge_ext
