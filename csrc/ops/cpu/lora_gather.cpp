#include "ops/lora_gather.h"

#include <cstring>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "ops/cpu/gather_tasks.h"
#include "ops/cpu/low_rank.h"
#include "ops/cpu/pieces.h"
#include "ops/rows.h"

namespace gauge_ext {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// In half precision the low-rank part is added to the finished product, in float32, and rounded
// with it; else it is written first, with the bias, and the product added onto it.
template <typename scalar_t>
constexpr bool kExpandFirst = std::is_same_v<scalar_t, typename AccOf<scalar_t>::type>;

std::vector<GatherTask> tasks_of(const LoraGatherSizes& n, const Tensor& index, int64_t adapters) {
  const Tensor dense = index.contiguous();
  const at::ArrayRef<int64_t> entries(dense.const_data_ptr<int64_t>(),
                                      static_cast<size_t>(dense.numel()));
  check_entries(entries, adapters);
  return gather_tasks(entries, n.rows_each);
}

// One adapter's factors as the kernels read them: (r, in) and (r, out), in acc_t. A thread makes
// them once for all tasks of the adapter that it comes by in a row.
template <typename acc_t>
class Factors {
 public:
  Factors(at::TensorList lora_A, at::TensorList lora_B) : lora_A_(lora_A), lora_B_(lora_B) {}

  void load(int64_t adapter) {
    if (adapter == adapter_) {
      return;
    }
    const auto i = static_cast<size_t>(adapter);
    A_ = lora_A_[i].to(acc_dtype<acc_t>()).contiguous();
    const Tensor B = lora_B_[i].to(acc_dtype<acc_t>()).contiguous();
    rank = A_.size(0);
    if (B.numel() > capacity_) {
      transposed_ = Buffer<acc_t>(B.numel());
      capacity_ = B.numel();
    }
    low_rank_kernels<acc_t>().transpose(data_of<acc_t>(B), B.size(0), rank, acc_t(1),
                                        transposed_.data());
    adapter_ = adapter;
  }

  const acc_t* right_A() const { return data_of<acc_t>(A_); }
  const acc_t* right_B() const { return transposed_.data(); }

  int64_t rank = 0;

 private:
  at::TensorList lora_A_, lora_B_;
  int64_t adapter_ = -1, capacity_ = 0;
  Tensor A_;
  Buffer<acc_t> transposed_;
};

// body(number of the task, factors to load), the tasks dealt out among threads
template <typename acc_t, typename F>
void for_each(const std::vector<GatherTask>& tasks,
              at::TensorList lora_A,
              at::TensorList lora_B,
              const F& body) {
  at::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    Factors<acc_t> factors(lora_A, lora_B);
    for (int64_t task = begin; task < end; ++task) {
      body(static_cast<size_t>(task), factors);
    }
  });
}

template <typename acc_t>
void scale(const Buffer<acc_t>& values, int64_t count, double factor) {
  for (int64_t k = 0; k < count; ++k) {
    values.data()[k] *= static_cast<acc_t>(factor);
  }
}

Tensor forward(const Tensor& x,
               const Tensor& weight,
               const OptionalTensor& bias,
               at::TensorList lora_A,
               at::TensorList lora_B,
               at::ArrayRef<double> scaling,
               const Tensor& index) {
  const auto n = check_lora_gather(x, weight, bias, lora_A, lora_B, scaling, index);
  const auto tasks = tasks_of(n, index, static_cast<int64_t>(lora_A.size()));
  const Tensor rows = rows_of(x, n.rows, n.in_features);
  const Tensor y = dispatch_dtype(x, [&](auto tag) {
    using scalar_t = decltype(tag);
    using acc_t = typename AccOf<scalar_t>::type;
    constexpr bool first = kExpandFirst<scalar_t>;
    const auto& kernels = low_rank_kernels<scalar_t>();
    const Tensor y = first ? at::empty({n.rows, n.out_features}, x.options())
                           : at::linear(rows, weight, bias).contiguous();
    const Tensor dense_bias = first && bias.has_value() ? bias->contiguous() : Tensor();
    const acc_t* bias_data = dense_bias.defined() ? data_of<acc_t>(dense_bias) : nullptr;
    for_each<acc_t>(tasks, lora_A, lora_B, [&](size_t at, Factors<acc_t>& factors) {
      const GatherTask& task = tasks[at];
      const int64_t count = task.count();
      const TaskRows<scalar_t> to(task, mutable_data_of<scalar_t>(y), n.out_features);
      if (task.adapter < 0) {
        if constexpr (first) {
          kernels.expand(to.get(), false, bias_data, count, n.out_features, nullptr, nullptr, 0,
                         acc_t(0));
          to.write();
        }
        return;
      }
      factors.load(task.adapter);
      const TaskRows<const scalar_t> from(task, data_of<scalar_t>(rows), n.in_features);
      const Buffer<acc_t> hidden(count * factors.rank);
      kernels.project(from.read(), 0, count, n.in_features, factors.right_A(), factors.rank,
                      Dropout(), hidden.data());
      kernels.expand(first ? to.get() : to.read(), !first, bias_data, count, n.out_features,
                     hidden.data(), factors.right_B(), factors.rank,
                     static_cast<acc_t>(scaling[static_cast<size_t>(task.adapter)]));
      to.write();
    });
    if constexpr (first) {
      y.addmm_(rows, weight.t());
    }
    return y;
  });
  return y.view(output_shape(x, n.out_features));
}

// What each task adds to the gradients of its factors: (r, in) and (r, out).
template <typename acc_t>
struct TaskSums {
  Buffer<acc_t> A, B;
};

template <typename acc_t>
Buffer<acc_t> zeros(int64_t count) {
  Buffer<acc_t> buffer(count);
  std::memset(buffer.data(), 0, static_cast<size_t>(count) * sizeof(acc_t));
  return buffer;
}

// The gradients of the factors of all adapters: sums over tasks, in order.
template <typename acc_t>
void sum_tasks(const std::vector<GatherTask>& tasks,
               const std::vector<TaskSums<acc_t>>& sums,
               at::TensorList lora_A,
               at::TensorList lora_B,
               std::vector<Tensor>& grads_A,
               std::vector<Tensor>& grads_B) {
  std::vector<Tensor> wide_A, wide_B;
  for (size_t i = 0; i < lora_A.size(); ++i) {
    const auto options = lora_A[i].options().dtype(acc_dtype<acc_t>());
    wide_A.push_back(at::zeros(lora_A[i].sizes(), options));
    wide_B.push_back(at::zeros({lora_B[i].size(1), lora_B[i].size(0)}, options));
  }
  const auto add = [](const Tensor& to, const Buffer<acc_t>& part) {
    acc_t* data = mutable_data_of<acc_t>(to);
    for (int64_t k = 0; k < to.numel(); ++k) {
      data[k] += part.data()[k];
    }
  };
  for (size_t at = 0; at < tasks.size(); ++at) {
    if (tasks[at].adapter >= 0) {
      add(wide_A[static_cast<size_t>(tasks[at].adapter)], sums[at].A);
      add(wide_B[static_cast<size_t>(tasks[at].adapter)], sums[at].B);
    }
  }
  for (size_t i = 0; i < lora_A.size(); ++i) {
    grads_A.push_back(wide_A[i].to(lora_A[i].scalar_type()));
    grads_B.push_back(wide_B[i].t().to(lora_B[i].scalar_type()).contiguous());
  }
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> backward(const Tensor& grad,
                                                                      const Tensor& x,
                                                                      const Tensor& weight,
                                                                      at::TensorList lora_A,
                                                                      at::TensorList lora_B,
                                                                      at::ArrayRef<double> scaling,
                                                                      const Tensor& index,
                                                                      bool needs_x,
                                                                      bool needs_factors) {
  const auto n = check_lora_gather(x, weight, std::nullopt, lora_A, lora_B, scaling, index);
  check_grad(grad, "grad", x, n.rows, n.out_features);
  const auto tasks = tasks_of(n, index, static_cast<int64_t>(lora_A.size()));
  const Tensor grads = rows_of(grad, n.rows, n.out_features);
  const Tensor rows = rows_of(x, n.rows, n.in_features);
  Tensor grad_x = at::empty({0}, x.options());
  std::vector<Tensor> grads_A, grads_B;
  dispatch_dtype(x, [&](auto tag) {
    using scalar_t = decltype(tag);
    using acc_t = typename AccOf<scalar_t>::type;
    constexpr bool first = kExpandFirst<scalar_t>;
    const auto& kernels = low_rank_kernels<scalar_t>();
    if (needs_x) {
      grad_x = first ? at::zeros({n.rows, n.in_features}, x.options()) : at::mm(grads, weight);
    }
    std::vector<TaskSums<acc_t>> sums(tasks.size());
    for_each<acc_t>(tasks, lora_A, lora_B, [&](size_t at, Factors<acc_t>& factors) {
      const GatherTask& task = tasks[at];
      if (task.adapter < 0) {
        return;
      }
      factors.load(task.adapter);
      const int64_t count = task.count(), rank = factors.rank;
      const TaskRows<const scalar_t> from(task, data_of<scalar_t>(rows), n.in_features);
      const TaskRows<const scalar_t> given(task, data_of<scalar_t>(grads), n.out_features);
      const scalar_t* x_rows = from.read();
      const Buffer<acc_t> hidden(count * rank), grad_hidden(count * rank);
      kernels.project(x_rows, 0, count, n.in_features, factors.right_A(), rank, Dropout(),
                      hidden.data());
      // s·x Aᵀ and s·grad B: each gradient has the scaling once.
      const double factor = scaling[static_cast<size_t>(task.adapter)];
      scale(hidden, count * rank, factor);
      sums[at].B = zeros<acc_t>(rank * n.out_features);
      kernels.project_reduce(given.read(), count, n.out_features, factors.right_B(), hidden.data(),
                             rank, grad_hidden.data(), sums[at].B.data());
      scale(grad_hidden, count * rank, factor);
      sums[at].A = zeros<acc_t>(rank * n.in_features);
      const auto run = [&](scalar_t* to) {
        kernels.expand_reduce(x_rows, to, !first, 0, count, n.in_features, grad_hidden.data(),
                              factors.right_A(), rank, Dropout(), sums[at].A.data());
      };
      if (needs_x) {
        const TaskRows<scalar_t> to(task, mutable_data_of<scalar_t>(grad_x), n.in_features);
        run(first ? to.get() : to.read());
        to.write();
      } else {
        run(nullptr);
      }
    });
    if constexpr (first) {
      if (needs_x) {
        grad_x.addmm_(grads, weight);
      }
    }
    if (needs_factors) {
      sum_tasks(tasks, sums, lora_A, lora_B, grads_A, grads_B);
    }
  });
  for (size_t i = 0; !needs_factors && i < lora_A.size(); ++i) {
    grads_A.push_back(at::empty({0}, lora_A[i].options()));
    grads_B.push_back(at::empty({0}, lora_B[i].options()));
  }
  return {needs_x ? grad_x.view(x.sizes()) : grad_x, grads_A, grads_B};
}

}  // namespace

TORCH_LIBRARY_IMPL(gauge_ext, CPU, m) {
  m.impl("lora_gather", &forward);
  m.impl("lora_gather_backward", &backward);
}

}  // namespace gauge_ext
