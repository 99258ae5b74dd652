#include "ops/cpu/factor_step.h"

#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops/cpu/capability.h"
#include "ops/cpu/factor_call.h"
#include "ops/cpu/lora_rite.h"
#include "ops/factor_step.h"

namespace gauge_ext {

// One table per capability, defined by factor_step_kernel.cpp, which is compiled once for each.
#define GAUGE_EXT_DECLARE_TABLES(CAPABILITY)                         \
  namespace CAPABILITY {                                             \
  extern const FactorStepKernels<float> factor_step_float;           \
  extern const FactorStepKernels<double> factor_step_double;         \
  extern const FactorStepKernels<BFloat16Bits> factor_step_bfloat16; \
  }
GAUGE_EXT_EACH_CAPABILITY(GAUGE_EXT_DECLARE_TABLES)
#undef GAUGE_EXT_DECLARE_TABLES

template <>
const FactorStepKernels<float>& factor_step_kernels<float>() {
  GAUGE_EXT_CHOOSE(factor_step_float)
}

template <>
const FactorStepKernels<double>& factor_step_kernels<double>() {
  GAUGE_EXT_CHOOSE(factor_step_double)
}

template <>
const FactorStepKernels<BFloat16Bits>& factor_step_kernels<BFloat16Bits>() {
  GAUGE_EXT_CHOOSE(factor_step_bfloat16)
}

namespace {

using at::Tensor;

void step(const FactorCall& call, StepRule rule, const std::vector<FactorStep>& steps) {
  dispatch_factors(call, [&](auto tag) {
    using scalar_t = decltype(tag);
    const auto layers = collect<scalar_t>(call, /*writes=*/true);
    const auto& kernels = factor_step_kernels<scalar_t>();
    const auto update = rule == StepRule::kGaugeAdam ? kernels.gauge_adam : kernels.scaled_gd;
    Whitening(layers, call.damping).for_each([&](int64_t i, const FactorMetric& metric) {
      update(layers[i], metric.e_a, metric.e_m, steps[i]);
    });
  });
}

Tensor gradient_norm(const FactorCall& call) {
  const Tensor norm = at::empty({}, at::kDouble);
  dispatch_factors(call, [&](auto tag) {
    using scalar_t = decltype(tag);
    const auto layers = collect<scalar_t>(call, /*writes=*/false);
    std::vector<double> norms(layers.size());
    const auto& kernels = factor_step_kernels<scalar_t>();
    Whitening(layers, call.damping).for_each([&](int64_t i, const FactorMetric& metric) {
      norms[i] = kernels.gradient_norm(layers[i], metric.e_a, metric.e_m);
    });
    double total = 0;
    for (const double one : norms) {
      total += one;
    }
    *norm.mutable_data_ptr<double>() = total;
  });
  return norm;
}

}  // namespace

TORCH_LIBRARY_IMPL(gauge_ext, CPU, m) {
  register_factor_steps(m, {&step, &gradient_norm, &lora_rite_step});
}

}  // namespace gauge_ext
