#pragma once

// The arguments of an optimizer step as the kernels take them, and the metric of all layers.

#include <atomic>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "ops/cpu/factor_step.h"
#include "ops/cpu/pieces.h"
#include "ops/factor_step.h"

namespace gauge_ext {

template <typename F>
void dispatch_factors(const FactorCall& call, const F& body) {
  dispatch_dtype(call.lora_A[0], "factors", "", body);
}

// body(layer's index), layers spread over torch's threads
template <typename F>
void for_each_layer(size_t layers, const F& body) {
  at::parallel_for(0, static_cast<int64_t>(layers), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      body(i);
    }
  });
}

// E_A, E_M and √δ of all layers; refuses before anything is written.
class Whitening {
 public:
  template <typename scalar_t>
  Whitening(const std::vector<FactorLayer<scalar_t>>& layers, double damping) {
    int64_t total = 0;
    for (const auto& layer : layers) {
      starts_.push_back(total);
      total += 2 * layer.rank * layer.rank + 1;
    }
    starts_.push_back(total);
    memory_ = at::empty({total}, at::kDouble);
    double* memory = memory_.mutable_data_ptr<double>();
    const auto& kernels = factor_step_kernels<scalar_t>();
    std::atomic<int64_t> refused = -1;
    for_each_layer(layers.size(), [&](int64_t i) {
      double* e = memory + starts_[i];
      const int64_t size = layers[i].rank * layers[i].rank;
      if (!kernels.whiten(layers[i], damping, e, e + size, e + 2 * size)) {
        refused = i;
      }
    });
    TORCH_CHECK(refused < 0, "pair ", refused.load(), kRefusedPair);
  }

  FactorMetric of(int64_t i) const {
    const double* e = memory_.const_data_ptr<double>() + starts_[i];
    const int64_t size = (starts_[i + 1] - starts_[i]) / 2;
    return {e, e + size, e[2 * size]};
  }

  // body(layer's index, its metric)
  template <typename F>
  void for_each(const F& body) const {
    for_each_layer(starts_.size() - 1, [&](int64_t i) { body(i, of(i)); });
  }

 private:
  std::vector<int64_t> starts_;
  at::Tensor memory_;
};

template <typename T>
T* data_or_null(at::TensorList tensors, size_t i) {
  return tensors.empty() ? nullptr : mutable_data_of<T>(tensors[i]);
}

template <typename scalar_t>
std::vector<FactorLayer<scalar_t>> collect(const FactorCall& call, bool writes) {
  using acc_t = typename AccOf<scalar_t>::type;
  const auto data = [writes](const at::Tensor& t) {
    // What is only read must not count as written: it may be shared copy on write.
    return writes ? mutable_data_of<scalar_t>(t) : const_cast<scalar_t*>(data_of<scalar_t>(t));
  };
  std::vector<FactorLayer<scalar_t>> layers;
  layers.reserve(call.lora_A.size());
  for (size_t i = 0; i < call.lora_A.size(); ++i) {
    const at::Tensor &A = call.lora_A[i], &B = call.lora_B[i];
    layers.push_back({data(A), data(B), data_of<scalar_t>(call.grad_A[i]),
                      data_of<scalar_t>(call.grad_B[i]), data_or_null<acc_t>(call.avg_A, i),
                      data_or_null<acc_t>(call.avg_B, i), data_or_null<acc_t>(call.sq_A, i),
                      data_or_null<acc_t>(call.sq_B, i), B.size(0), A.size(1), A.size(0),
                      call.scaling[i], call.anchors[i] == 1});
  }
  return layers;
}

// The op's implementation, see FactorStepDevice
void lora_rite_step(const FactorCall& call, const std::vector<FactorStep>& steps);

}  // namespace gauge_ext
