#include "ops/cpu/factor_step.h"

#include <atomic>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops/cpu/capability.h"
#include "ops/cpu/pieces.h"
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
using at::TensorList;

template <typename F>
void dispatch_factors(const FactorCall& call, const F& body) {
  dispatch_dtype(call.lora_A[0], "factors", "", body);
}

// E_A and E_M of all layers, one after the other.
class Whitening {
 public:
  template <typename scalar_t>
  Whitening(const std::vector<FactorLayer<scalar_t>>& layers, double damping) {
    int64_t total = 0;
    for (const auto& layer : layers) {
      starts_.push_back(total);
      total += 2 * layer.rank * layer.rank;
    }
    memory_ = at::empty({total}, at::kDouble);
    double* memory = memory_.mutable_data_ptr<double>();
    const auto& kernels = factor_step_kernels<scalar_t>();
    std::atomic<int64_t> refused = -1;
    at::parallel_for(0, static_cast<int64_t>(layers.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        double* e = memory + starts_[i];
        if (!kernels.whiten(layers[i], damping, e, e + layers[i].rank * layers[i].rank)) {
          refused = i;
        }
      }
    });
    // Before anything is written
    TORCH_CHECK(refused < 0, "pair ", refused.load(), kRefusedPair);
  }

  // body(layer's index, E_A, E_M)
  template <typename scalar_t, typename F>
  void for_each(const std::vector<FactorLayer<scalar_t>>& layers, const F& body) const {
    const double* memory = memory_.const_data_ptr<double>();
    at::parallel_for(0, static_cast<int64_t>(layers.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const double* e = memory + starts_[i];
        body(i, e, e + layers[i].rank * layers[i].rank);
      }
    });
  }

 private:
  std::vector<int64_t> starts_;
  Tensor memory_;
};

template <typename T>
T* data_or_null(TensorList tensors, size_t i) {
  return tensors.empty() ? nullptr : mutable_data_of<T>(tensors[i]);
}

template <typename scalar_t>
std::vector<FactorLayer<scalar_t>> collect(const FactorCall& call, bool writes) {
  using acc_t = typename AccOf<scalar_t>::type;
  const auto data = [writes](const Tensor& t) {
    // What is only read must not count as written: it may be shared copy on write.
    return writes ? mutable_data_of<scalar_t>(t) : const_cast<scalar_t*>(data_of<scalar_t>(t));
  };
  std::vector<FactorLayer<scalar_t>> layers;
  layers.reserve(call.lora_A.size());
  for (size_t i = 0; i < call.lora_A.size(); ++i) {
    const Tensor &A = call.lora_A[i], &B = call.lora_B[i];
    layers.push_back({data(A), data(B), data_of<scalar_t>(call.grad_A[i]),
                      data_of<scalar_t>(call.grad_B[i]), data_or_null<acc_t>(call.avg_A, i),
                      data_or_null<acc_t>(call.avg_B, i), data_or_null<acc_t>(call.sq_A, i),
                      data_or_null<acc_t>(call.sq_B, i), B.size(0), A.size(1), A.size(0),
                      call.scaling[i], call.anchors[i] == 1});
  }
  return layers;
}

void step(const FactorCall& call, StepRule rule, const std::vector<FactorStep>& steps) {
  dispatch_factors(call, [&](auto tag) {
    using scalar_t = decltype(tag);
    const auto layers = collect<scalar_t>(call, /*writes=*/true);
    const auto& kernels = factor_step_kernels<scalar_t>();
    const auto update = rule == StepRule::kGaugeAdam ? kernels.gauge_adam : kernels.scaled_gd;
    Whitening(layers, call.damping)
        .for_each(layers, [&](int64_t i, const double* e_a, const double* e_m) {
          update(layers[i], e_a, e_m, steps[i]);
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
    Whitening(layers, call.damping)
        .for_each(layers, [&](int64_t i, const double* e_a, const double* e_m) {
          norms[i] = kernels.gradient_norm(layers[i], e_a, e_m);
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
  register_factor_steps(m, {&step, &gradient_norm});
}

}  // namespace gauge_ext
