// The optimizer steps on CUDA tensors: the arguments of all layers go to the device as a table, and
// every kernel works on all layers at once. Nothing waits for the device: a pair that is refused
// makes the call write nothing, and the next call on that device says so.

#include "ops/factor_step.h"

#include <algorithm>
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
  // Never freed: at exit CUDA may be gone before static objects are, and pinned memory is CUDA's.
  static auto& reports = *new std::map<int, Tensor>;
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
              refused - 1, kRefusedPair);
}

void* data_or_null(TensorList tensors, size_t i) {
  return tensors.empty() ? nullptr : tensors[i].mutable_data_ptr();
}

// The table of a call and what its kernels work in
class Launches {
 public:
  // `steps` is empty where nothing is written; `wide` where the pass is in float64.
  Launches(const FactorCall& call, const std::vector<FactorStep>& steps, bool wide)
      : wide_(wide), n_{static_cast<int64_t>(call.lora_A.size()), 0, 0} {
    const Tensor& first = call.lora_A[0];
    const bool writes = !steps.empty();
    const auto data = [writes](const Tensor& t) {
      // What is only read must not count as written: it may be shared copy on write.
      return writes ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr());
    };
    std::vector<FactorPair> pairs;
    for (size_t i = 0; i < call.lora_A.size(); ++i) {
      const Tensor &A = call.lora_A[i], &B = call.lora_B[i];
      const int64_t rank = A.size(0), columns = A.size(1), rows = B.size(0);
      TORCH_CHECK(rank <= kLargestFactorRank, "lora_A[", i, "] must have a rank of at most ",
                  kLargestFactorRank, " on CUDA, got ", rank);
      n_.max_rank = std::max(n_.max_rank, rank);
      n_.max_length = std::max({n_.max_length, rows, columns});
      pairs.push_back(
          {data(A), data(B), call.grad_A[i].const_data_ptr(), call.grad_B[i].const_data_ptr(),
           data_or_null(call.avg_A, i), data_or_null(call.avg_B, i), data_or_null(call.sq_A, i),
           data_or_null(call.sq_B, i), rows, columns, rank, call.anchors[i], call.scaling[i],
           writes ? steps[i].correction1 : 1.0, writes ? steps[i].correction2 : 1.0});
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

void step(const FactorCall& call, StepRule rule, const std::vector<FactorStep>& steps) {
  const Tensor& first = call.lora_A[0];
  const auto guard = guard_of(first);
  check_report(first.device());
  const Launches launches(call, steps, /*wide=*/false);
  dispatch(first, "lora_A", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    launches.whiten<scalar_t>(call.damping);
    launches.step<scalar_t>(rule, steps[0]);  // of which the table has each pair's corrections
  });
}

Tensor gradient_norm(const FactorCall& call) {
  const Tensor& first = call.lora_A[0];
  const auto guard = guard_of(first);
  const Tensor norm = at::empty({}, first.options().dtype(at::kDouble));
  const Launches launches(call, {}, /*wide=*/true);
  dispatch(first, "lora_A", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    launches.whiten<scalar_t>(call.damping);
    launches.gradient_norm<scalar_t>(norm);
  });
  return norm;
}

}  // namespace

TORCH_LIBRARY_IMPL(gauge_ext, CUDA, m) {
  register_factor_steps(m, {&step, &gradient_norm, nullptr});
}

}  // namespace gauge_ext::cuda
