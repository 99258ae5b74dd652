// The optimizer steps on CUDA tensors: the arguments of all layers go to the device as a table, and
// every kernel works on all layers at once. Nothing waits for the device: a pair that is refused
// makes the call write nothing, and the next call on that device says so.

#include "ops/factor_step.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "ops/cuda/factor_step.h"
#include "ops/cuda/launch.h"
#include "ops/cuda/upload.h"

namespace gauge_ext::cuda {
namespace {

using at::Tensor;
using at::TensorList;

// A number for each device in pinned memory, which the device writes and the host reads whenever it
// comes by. It has to exist before a graph is captured: a step before the capture sees to that.
volatile int* report_of(const at::Device& device) {
  static std::mutex mutex;
  static std::map<int, Tensor> reports;
  const std::lock_guard<std::mutex> lock(mutex);
  Tensor& report = reports[device.index()];
  if (!report.defined()) {
    report = at::empty({1}, at::TensorOptions().dtype(at::kInt).pinned_memory(true));
    *report.mutable_data_ptr<int>() = 0;
  }
  return report.mutable_data_ptr<int>();
}

void check_report(const at::Device& device) {
  volatile int* report = report_of(device);
  const int refused = *report;
  *report = 0;
  TORCH_CHECK(refused == 0, "in an earlier step on ", device, ", which wrote nothing, pair ",
              refused - 1,
              ": lora_A (lora_B where training starts from "
              "lora_A = 0) has a rank below r, or a factor holds NaN or infinity, where the "
              "invariant step is undefined. Start with a factor of full rank, such as attach() "
              "draws");
}

// The state of one kind for all layers
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

at::ScalarType state_dtype(const Tensor& factor) {
  return factor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void* data_or_null(TensorList tensors, size_t i) {
  return tensors.empty() ? nullptr : tensors[i].mutable_data_ptr();
}

struct State {
  TensorList avg_A, avg_B, sq_A, sq_B;
};

// The table of a call and what its kernels work in
class Call {
 public:
  Call(TensorList lora_A,
       TensorList lora_B,
       TensorList grad_A,
       TensorList grad_B,
       const State& state,
       at::ArrayRef<double> scaling,
       at::IntArrayRef anchors,
       const std::vector<std::pair<double, double>>& corrections,
       bool writes,
       bool wide)
      : wide_(wide), n_{static_cast<int64_t>(lora_A.size()), 0, 0} {
    const Tensor& first = lora_A[0];
    const auto data = [writes](const Tensor& t) {
      // What is only read must not count as written: it may be shared copy on write.
      return writes ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr());
    };
    std::vector<FactorPair> pairs;
    for (size_t i = 0; i < lora_A.size(); ++i) {
      const int64_t rank = lora_A[i].size(0), columns = lora_A[i].size(1);
      const int64_t rows = lora_B[i].size(0);
      TORCH_CHECK(rank <= kLargestFactorRank, "lora_A[", i, "] must have a rank of at most ",
                  kLargestFactorRank, " on CUDA, got ", rank);
      n_.max_rank = std::max(n_.max_rank, rank);
      n_.max_length = std::max({n_.max_length, rows, columns});
      const auto [correction1, correction2] =
          corrections.empty() ? std::pair<double, double>(1.0, 1.0) : corrections[i];
      pairs.push_back({data(lora_A[i]), data(lora_B[i]), grad_A[i].const_data_ptr(),
                       grad_B[i].const_data_ptr(), data_or_null(state.avg_A, i),
                       data_or_null(state.avg_B, i), data_or_null(state.sq_A, i),
                       data_or_null(state.sq_B, i), rows, columns, rank, anchors[i], scaling[i],
                       correction1, correction2});
    }
    const auto bytes = static_cast<int64_t>(pairs.size() * sizeof(FactorPair));
    table_ = at::empty({bytes}, first.options().dtype(at::kByte));
    upload(pairs.data(), bytes, table_.mutable_data_ptr(), stream_);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    const auto sizes = factor_work_sizes(n_);
    const auto doubles = first.options().dtype(at::kDouble);
    const bool in_doubles = wide || first.scalar_type() == at::kDouble;
    grams_ = at::empty({sizes.grams}, doubles);
    inverses_ = at::empty({sizes.inverses}, doubles);
    deltas_ = at::empty({sizes.deltas}, doubles);
    factors_ = at::empty({sizes.factors}, doubles.dtype(in_doubles ? at::kDouble : at::kFloat));
    norms_ = at::empty({sizes.norms}, doubles);
    refused_ = at::zeros({1}, doubles.dtype(at::kInt));
    work_ = {grams_.mutable_data_ptr<double>(),
             inverses_.mutable_data_ptr<double>(),
             deltas_.mutable_data_ptr<double>(),
             factors_.mutable_data_ptr(),
             norms_.mutable_data_ptr<double>(),
             refused_.mutable_data_ptr<int>(),
             const_cast<int*>(writes ? report_of(first.device()) : nullptr)};
  }

  template <typename scalar_t>
  void whiten(double damping) const {
    factor_step_kernels<scalar_t>().whiten(pairs(), n_, damping, wide_, work_, stream_);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  template <typename scalar_t>
  void step(StepRule rule, const FactorStep& step) const {
    factor_step_kernels<scalar_t>().step(pairs(), n_, rule, step, work_, stream_);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  template <typename scalar_t>
  void gradient_norm(const Tensor& norm) const {
    factor_step_kernels<scalar_t>().gradient_norm(pairs(), n_, work_,
                                                  norm.mutable_data_ptr<double>(), stream_);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  const FactorPair* pairs() const {
    return static_cast<const FactorPair*>(table_.const_data_ptr());
  }

  bool wide_;
  FactorSizes n_;
  Stream stream_ = current_stream();
  Tensor table_, grams_, inverses_, deltas_, factors_, norms_, refused_;
  FactorWork work_;
};

double kept(double lr, double weight_decay) {
  const double left = 1.0 - lr * weight_decay;
  TORCH_CHECK(left >= 0, "lr * weight_decay must be at most 1, got ", lr * weight_decay);
  return std::sqrt(left);
}

void run(const Call& call,
         const Tensor& like,
         StepRule rule,
         const FactorStep& step,
         double damping) {
  dispatch(like, "lora_A", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    call.whiten<scalar_t>(damping);
    call.step<scalar_t>(rule, step);
  });
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
  if (momentum != 0 || !avg_A.empty()) {
    check_state(avg_A, lora_A, "avg_A", -1, state_dtype(lora_A[0]));
    check_state(avg_B, lora_B, "avg_B", -1, state_dtype(lora_A[0]));
  }
  const FactorStep step = {lr, kept(lr, weight_decay), grad_scale, momentum, 0, 0, 1, 1, nesterov};
  const auto guard = guard_of(lora_A[0]);
  check_report(lora_A[0].device());
  const Call call(lora_A, lora_B, grad_A, grad_B, {avg_A, avg_B, {}, {}}, scaling, anchors, {},
                  /*writes=*/true, /*wide=*/false);
  run(call, lora_A[0], StepRule::kScaledGd, step, damping);
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
  const auto dtype = state_dtype(lora_A[0]);
  check_state(avg_A, lora_A, "avg_A", -1, dtype);
  check_state(avg_B, lora_B, "avg_B", -1, dtype);
  check_state(sq_A, lora_A, "sq_A", 1, dtype);
  check_state(sq_B, lora_B, "sq_B", 0, dtype);
  const FactorStep step = {lr, kept(lr, weight_decay), grad_scale, beta1, beta2, eps, 1, 1, false};
  std::vector<std::pair<double, double>> corrections;
  for (const int64_t count : steps) {
    const auto t = static_cast<double>(count);
    corrections.emplace_back(1 - std::pow(beta1, t), 1 - std::pow(beta2, t));
  }
  const auto guard = guard_of(lora_A[0]);
  check_report(lora_A[0].device());
  const Call call(lora_A, lora_B, grad_A, grad_B, {avg_A, avg_B, sq_A, sq_B}, scaling, anchors,
                  corrections, /*writes=*/true, /*wide=*/false);
  run(call, lora_A[0], StepRule::kGaugeAdam, step, damping);
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
  const auto guard = guard_of(lora_A[0]);
  const Tensor norm = at::empty({}, lora_A[0].options().dtype(at::kDouble));
  const Call call(lora_A, lora_B, grad_A, grad_B, {}, scaling, anchors, {}, /*writes=*/false,
                  /*wide=*/true);
  dispatch(lora_A[0], "lora_A", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    call.whiten<scalar_t>(damping);
    call.gradient_norm<scalar_t>(norm);
  });
  return norm;
}

}  // namespace

TORCH_LIBRARY_IMPL(gauge_ext, CUDA, m) {
  m.impl("scaled_gd_step", &scaled_gd_step);
  m.impl("gauge_adam_step", &gauge_adam_step);
  m.impl("factor_gradient_norm", &factor_gradient_norm);
}

}  // namespace gauge_ext::cuda
