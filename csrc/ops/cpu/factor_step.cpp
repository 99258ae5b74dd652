#include "ops/cpu/factor_step.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <utility>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops/cpu/capability.h"
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
void dispatch_dtype(const Tensor& factor, const F& body) {
  switch (factor.scalar_type()) {
    case at::kFloat:
      return body(float());
    case at::kDouble:
      return body(double());
    case at::kBFloat16:
      return body(BFloat16Bits());
    default:
      TORCH_CHECK(false, "factors must be float32, float64 or bfloat16 on the CPU, got ",
                  factor.scalar_type());
  }
}

template <typename scalar_t>
constexpr at::ScalarType acc_dtype() {
  return std::is_same_v<scalar_t, double> ? at::kDouble : at::kFloat;
}

// The state of one kind for all layers, or none.
void check_state(TensorList state,
                 TensorList factors,
                 const char* name,
                 int64_t numbers_along,  // the dimension that there is one number for, or -1: all
                 at::ScalarType dtype) {
  TORCH_CHECK(state.size() == factors.size(), name, " must have ", factors.size(),
              " entries, one for each pair, got ", state.size());
  for (size_t i = 0; i < state.size(); ++i) {
    const auto shape =
        numbers_along < 0 ? factors[i].sizes() : factors[i].sizes().slice(numbers_along, 1);
    TORCH_CHECK(state[i].sizes() == shape && state[i].scalar_type() == dtype &&
                    state[i].device() == factors[i].device() && state[i].is_contiguous(),
                name, "[", i, "] must be contiguous, of shape ", shape, " and ", dtype, ", got ",
                state[i].sizes(), " and ", state[i].scalar_type());
  }
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
    TORCH_CHECK(refused < 0, "pair ", refused.load(),
                ": lora_A (lora_B where training starts from "
                "lora_A = 0) has a rank below r, or a factor holds NaN or infinity, where the "
                "invariant step is undefined. Start with a factor of full rank, such as attach() "
                "draws");
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
  return tensors.empty() ? nullptr : static_cast<T*>(tensors[i].mutable_data_ptr());
}

template <typename scalar_t>
std::vector<FactorLayer<scalar_t>> collect(TensorList lora_A,
                                           TensorList lora_B,
                                           TensorList grad_A,
                                           TensorList grad_B,
                                           TensorList avg_A,
                                           TensorList avg_B,
                                           TensorList sq_A,
                                           TensorList sq_B,
                                           at::ArrayRef<double> scaling,
                                           at::IntArrayRef anchors,
                                           bool writes) {
  using acc_t = typename AccOf<scalar_t>::type;
  const auto data = [writes](const Tensor& t) {
    // What is only read must not count as written: it may be shared copy on write.
    return static_cast<scalar_t*>(writes ? t.mutable_data_ptr()
                                         : const_cast<void*>(t.const_data_ptr()));
  };
  std::vector<FactorLayer<scalar_t>> layers;
  layers.reserve(lora_A.size());
  for (size_t i = 0; i < lora_A.size(); ++i) {
    layers.push_back(
        {data(lora_A[i]), data(lora_B[i]), static_cast<const scalar_t*>(grad_A[i].const_data_ptr()),
         static_cast<const scalar_t*>(grad_B[i].const_data_ptr()), data_or_null<acc_t>(avg_A, i),
         data_or_null<acc_t>(avg_B, i), data_or_null<acc_t>(sq_A, i), data_or_null<acc_t>(sq_B, i),
         lora_B[i].size(0), lora_A[i].size(1), lora_A[i].size(0), scaling[i], anchors[i] == 1});
  }
  return layers;
}

double kept(double lr, double weight_decay) {
  const double left = 1.0 - lr * weight_decay;
  TORCH_CHECK(left >= 0, "lr * weight_decay must be at most 1, got ", lr * weight_decay);
  return std::sqrt(left);
}

void scaled_gd_step(TensorList lora_A,
                    TensorList lora_B,
                    TensorList grad_A,
                    TensorList grad_B,
                    TensorList avg_A,
                    TensorList avg_B,
                    at::ArrayRef<double> scaling,
                    at::IntArrayRef anchors,
                    double lr,
                    double momentum,
                    bool nesterov,
                    double weight_decay,
                    double damping,
                    double grad_scale) {
  check_factors(lora_A, lora_B, grad_A, grad_B, scaling, anchors, damping);
  if (lora_A.empty()) {
    return;
  }
  dispatch_dtype(lora_A[0], [&](auto tag) {
    using scalar_t = decltype(tag);
    if (momentum != 0 || !avg_A.empty()) {
      check_state(avg_A, lora_A, "avg_A", -1, acc_dtype<scalar_t>());
      check_state(avg_B, lora_B, "avg_B", -1, acc_dtype<scalar_t>());
    }
    const auto layers = collect<scalar_t>(lora_A, lora_B, grad_A, grad_B, avg_A, avg_B, {}, {},
                                          scaling, anchors, /*writes=*/true);
    const FactorStep step = {lr,      kept(lr, weight_decay), grad_scale, momentum, 0, 0, 1, 1,
                             nesterov};
    const auto& kernels = factor_step_kernels<scalar_t>();
    Whitening(layers, damping).for_each(layers, [&](int64_t i, const double* a, const double* m) {
      kernels.scaled_gd(layers[i], a, m, step);
    });
  });
}

void gauge_adam_step(TensorList lora_A,
                     TensorList lora_B,
                     TensorList grad_A,
                     TensorList grad_B,
                     TensorList avg_A,
                     TensorList avg_B,
                     TensorList sq_A,
                     TensorList sq_B,
                     at::ArrayRef<double> scaling,
                     at::IntArrayRef anchors,
                     at::IntArrayRef steps,
                     double lr,
                     double beta1,
                     double beta2,
                     double eps,
                     double weight_decay,
                     double damping,
                     double grad_scale) {
  check_factors(lora_A, lora_B, grad_A, grad_B, scaling, anchors, damping);
  TORCH_CHECK(steps.size() == lora_A.size(), "steps must have ", lora_A.size(),
              " entries, one for each pair, got ", steps.size());
  if (lora_A.empty()) {
    return;
  }
  dispatch_dtype(lora_A[0], [&](auto tag) {
    using scalar_t = decltype(tag);
    constexpr auto dtype = acc_dtype<scalar_t>();
    check_state(avg_A, lora_A, "avg_A", -1, dtype);
    check_state(avg_B, lora_B, "avg_B", -1, dtype);
    check_state(sq_A, lora_A, "sq_A", 1, dtype);
    check_state(sq_B, lora_B, "sq_B", 0, dtype);
    const auto layers = collect<scalar_t>(lora_A, lora_B, grad_A, grad_B, avg_A, avg_B, sq_A, sq_B,
                                          scaling, anchors, /*writes=*/true);
    const double keep = kept(lr, weight_decay);
    const auto& kernels = factor_step_kernels<scalar_t>();
    Whitening(layers, damping).for_each(layers, [&](int64_t i, const double* a, const double* m) {
      const auto t = static_cast<double>(steps[i]);
      kernels.gauge_adam(layers[i], a, m,
                         {lr, keep, grad_scale, beta1, beta2, eps, 1 - std::pow(beta1, t),
                          1 - std::pow(beta2, t), false});
    });
  });
}

Tensor factor_gradient_norm(TensorList lora_A,
                            TensorList lora_B,
                            TensorList grad_A,
                            TensorList grad_B,
                            at::ArrayRef<double> scaling,
                            at::IntArrayRef anchors,
                            double damping) {
  check_factors(lora_A, lora_B, grad_A, grad_B, scaling, anchors, damping);
  TORCH_CHECK(!lora_A.empty(), "lora_A must have an entry, got an empty list");
  const Tensor norm = at::empty({}, at::kDouble);
  dispatch_dtype(lora_A[0], [&](auto tag) {
    using scalar_t = decltype(tag);
    const auto layers = collect<scalar_t>(lora_A, lora_B, grad_A, grad_B, {}, {}, {}, {}, scaling,
                                          anchors, /*writes=*/false);
    std::vector<double> norms(layers.size());
    const auto& kernels = factor_step_kernels<scalar_t>();
    Whitening(layers, damping).for_each(layers, [&](int64_t i, const double* a, const double* m) {
      norms[i] = kernels.gradient_norm(layers[i], a, m);
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
  m.impl("scaled_gd_step", &scaled_gd_step);
  m.impl("gauge_adam_step", &gauge_adam_step);
  m.impl("factor_gradient_norm", &factor_gradient_norm);
}

}  // namespace gauge_ext
