#include "ops/lora_gather.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "ops/cpu/low_rank.h"

namespace gauge_ext {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Rows that one task reads together: enough for B to be transposed once, few enough to stay in
// cache.
constexpr int64_t kTaskRows = 128;

// In half precision the low-rank part is added to the finished product, in float32, and rounded
// with it; else it is written first, with the bias, and the product added onto it.
template <typename scalar_t>
constexpr bool kExpandFirst = std::is_same_v<scalar_t, typename AccOf<scalar_t>::type>;

template <typename F>
auto dispatch_dtype(const Tensor& x, const F& body) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return body(float());
    case at::kDouble:
      return body(double());
    case at::kBFloat16:
      return body(BFloat16Bits());
    default:
      TORCH_CHECK(false, "x must be float32, float64 or bfloat16 on the CPU, got ", x.scalar_type(),
                  "; convert the model, for example with model.float()");
  }
}

// Some rows of one adapter. Neighbours in `rows` need not be neighbours in x.
struct Task {
  int64_t adapter;  // -1: none
  std::vector<int64_t> rows;

  bool contiguous() const {
    return rows.back() - rows.front() + 1 == static_cast<int64_t>(rows.size());
  }
};

// The rows sorted by adapter and cut into tasks, by sizes alone: every sum over tasks, taken in
// order, is the same for any number of threads.
std::vector<Task> tasks_of(const LoraGatherSizes& n, const Tensor& index, int64_t adapters) {
  const Tensor dense = index.contiguous();
  const int64_t* entries = dense.const_data_ptr<int64_t>();
  std::vector<int64_t> order(static_cast<size_t>(index.numel()));
  std::iota(order.begin(), order.end(), 0);
  for (const int64_t entry : order) {
    TORCH_CHECK(entries[entry] >= -1 && entries[entry] < adapters, "index must be in [-1, ",
                adapters, ") for ", adapters, " adapters, got ", entries[entry]);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return entries[a] < entries[b]; });
  std::vector<Task> tasks;
  for (const int64_t entry : order) {
    for (int64_t row = entry * n.rows_each; row < (entry + 1) * n.rows_each; ++row) {
      if (tasks.empty() || tasks.back().adapter != entries[entry] ||
          static_cast<int64_t>(tasks.back().rows.size()) == kTaskRows) {
        tasks.push_back({entries[entry], {}});
      }
      tasks.back().rows.push_back(row);
    }
  }
  return tasks;
}

template <typename F>
void for_each(const std::vector<Task>& tasks, const F& body) {
  at::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      body(static_cast<size_t>(task));
    }
  });
}

// The rows of a task one after the other: in place where they lie so, else copied, and back.
template <typename scalar_t>
class Rows {
 public:
  Rows(const Task& task, scalar_t* data, int64_t columns)
      : task_(task), data_(data), columns_(columns) {
    if (!task.contiguous()) {
      copy_.resize(task.rows.size() * static_cast<size_t>(columns));
    }
  }

  scalar_t* get() { return copy_.empty() ? data_ + task_.rows.front() * columns_ : copy_.data(); }

  scalar_t* read() {
    for (size_t i = 0; i < copy_.size(); i += static_cast<size_t>(columns_)) {
      std::memcpy(copy_.data() + i, row_of(i), static_cast<size_t>(columns_) * sizeof(scalar_t));
    }
    return get();
  }

  void write() const {
    for (size_t i = 0; i < copy_.size(); i += static_cast<size_t>(columns_)) {
      std::memcpy(row_of(i), copy_.data() + i, static_cast<size_t>(columns_) * sizeof(scalar_t));
    }
  }

 private:
  scalar_t* row_of(size_t offset) const {
    return data_ + task_.rows[offset / static_cast<size_t>(columns_)] * columns_;
  }

  const Task& task_;
  scalar_t* data_;
  int64_t columns_;
  std::vector<scalar_t> copy_;
};

// The factors as the kernels read them: (r, in) and (r, out), in acc_t.
template <typename acc_t>
struct Factors {
  Tensor A, B;
  std::unique_ptr<acc_t[]> transposed;
  int64_t rank;

  Factors(const Tensor& lora_A, const Tensor& lora_B)
      : A(lora_A.to(c10::CppTypeToScalarType<acc_t>::value).contiguous()),
        B(lora_B.to(c10::CppTypeToScalarType<acc_t>::value).contiguous()),
        transposed(std::make_unique_for_overwrite<acc_t[]>(static_cast<size_t>(lora_B.numel()))),
        rank(lora_A.size(0)) {
    low_rank_kernels<acc_t>().transpose(B.template const_data_ptr<acc_t>(), lora_B.size(0), rank,
                                        acc_t(1), transposed.get());
  }

  const acc_t* right_A() const { return A.template const_data_ptr<acc_t>(); }
  const acc_t* right_B() const { return transposed.get(); }
};

template <typename scalar_t>
scalar_t* data_of(const Tensor& tensor) {
  return static_cast<scalar_t*>(const_cast<void*>(tensor.const_data_ptr()));
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
  const Tensor rows = x.contiguous().view({n.rows, n.in_features});
  const Tensor y = dispatch_dtype(x, [&](auto tag) {
    using scalar_t = decltype(tag);
    using acc_t = typename AccOf<scalar_t>::type;
    constexpr bool first = kExpandFirst<scalar_t>;
    const auto& kernels = low_rank_kernels<scalar_t>();
    const Tensor y = first ? at::empty({n.rows, n.out_features}, x.options())
                           : at::linear(rows, weight, bias).contiguous();
    const Tensor dense_bias = first && bias.has_value() ? bias->contiguous() : Tensor();
    const acc_t* bias_data = dense_bias.defined() ? data_of<acc_t>(dense_bias) : nullptr;
    for_each(tasks, [&](size_t at) {
      const Task& task = tasks[at];
      const auto count = static_cast<int64_t>(task.rows.size());
      Rows<scalar_t> to(task, y.mutable_data_ptr() ? data_of<scalar_t>(y) : nullptr,
                        n.out_features);
      if (task.adapter < 0) {
        if constexpr (first) {
          kernels.expand(to.get(), false, bias_data, count, n.out_features, nullptr, nullptr, 0,
                         acc_t(0));
          to.write();
        }
        return;
      }
      const auto i = static_cast<size_t>(task.adapter);
      const Factors<acc_t> factors(lora_A[i], lora_B[i]);
      Rows<scalar_t> from(task, data_of<scalar_t>(rows), n.in_features);
      std::vector<acc_t> hidden(static_cast<size_t>(count * factors.rank));
      kernels.project(from.read(), 0, count, n.in_features, factors.right_A(), factors.rank,
                      Dropout(), hidden.data());
      kernels.expand(first ? to.get() : to.read(), !first, bias_data, count, n.out_features,
                     hidden.data(), factors.right_B(), factors.rank,
                     static_cast<acc_t>(scaling[i]));
      to.write();
    });
    if constexpr (first) {
      y.addmm_(rows, weight.t());
    }
    return y;
  });
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = n.out_features;
  return y.view(shape);
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
  TORCH_CHECK(grad.dim() == x.dim() && grad.size(-1) == n.out_features &&
                  grad.numel() == n.rows * n.out_features,
              "grad must have shape [*batch, out] = [*, ", n.out_features, "] to fit x ", x.sizes(),
              ", got ", grad.sizes());
  const auto tasks = tasks_of(n, index, static_cast<int64_t>(lora_A.size()));
  const Tensor grads = grad.contiguous().view({n.rows, n.out_features});
  const Tensor rows = x.contiguous().view({n.rows, n.in_features});
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
    // What each task adds to the gradients of its factors, (r, in) and (r, out).
    std::vector<std::vector<acc_t>> sums_A(tasks.size()), sums_B(tasks.size());
    for_each(tasks, [&](size_t at) {
      const Task& task = tasks[at];
      if (task.adapter < 0) {
        return;
      }
      const auto count = static_cast<int64_t>(task.rows.size());
      const auto i = static_cast<size_t>(task.adapter);
      const Factors<acc_t> factors(lora_A[i], lora_B[i]);
      const int64_t rank = factors.rank;
      Rows<scalar_t> from(task, data_of<scalar_t>(rows), n.in_features);
      Rows<scalar_t> given(task, data_of<scalar_t>(grads), n.out_features);
      const scalar_t* x_rows = from.read();
      std::vector<acc_t> hidden(static_cast<size_t>(count * rank)), grad_hidden(hidden.size());
      kernels.project(x_rows, 0, count, n.in_features, factors.right_A(), rank, Dropout(),
                      hidden.data());
      // s·x Aᵀ and s·grad B: each gradient has the scaling once.
      const auto scale = static_cast<acc_t>(scaling[i]);
      for (auto& value : hidden) {
        value *= scale;
      }
      sums_B[at].resize(static_cast<size_t>(rank * n.out_features));
      kernels.project_reduce(given.read(), count, n.out_features, factors.right_B(), hidden.data(),
                             rank, grad_hidden.data(), sums_B[at].data());
      for (auto& value : grad_hidden) {
        value *= scale;
      }
      sums_A[at].resize(static_cast<size_t>(rank * n.in_features));
      scalar_t* x_grad = nullptr;
      Rows<scalar_t> to(task, needs_x ? data_of<scalar_t>(grad_x) : nullptr, n.in_features);
      if (needs_x) {
        x_grad = first ? to.get() : to.read();
      }
      kernels.expand_reduce(x_rows, x_grad, !first, 0, count, n.in_features, grad_hidden.data(),
                            factors.right_A(), rank, Dropout(), sums_A[at].data());
      if (needs_x) {
        to.write();
      }
    });
    if constexpr (first) {
      if (needs_x) {
        grad_x.addmm_(grads, weight);
      }
    }
    if (!needs_factors) {
      return;
    }
    std::vector<Tensor> wide_A, wide_B;
    const auto options = x.options().dtype(c10::CppTypeToScalarType<acc_t>::value);
    for (size_t i = 0; i < lora_A.size(); ++i) {
      wide_A.push_back(at::zeros(lora_A[i].sizes(), options));
      wide_B.push_back(at::zeros({lora_A[i].size(0), n.out_features}, options));
    }
    const auto add = [](const Tensor& to, const std::vector<acc_t>& part) {
      acc_t* data = to.mutable_data_ptr<acc_t>();
      for (size_t k = 0; k < part.size(); ++k) {
        data[k] += part[k];
      }
    };
    for (size_t at = 0; at < tasks.size(); ++at) {
      if (tasks[at].adapter >= 0) {
        add(wide_A[static_cast<size_t>(tasks[at].adapter)], sums_A[at]);
        add(wide_B[static_cast<size_t>(tasks[at].adapter)], sums_B[at]);
      }
    }
    for (size_t i = 0; i < lora_A.size(); ++i) {
      grads_A.push_back(wide_A[i].to(lora_A[i].scalar_type()));
      grads_B.push_back(wide_B[i].t().to(lora_B[i].scalar_type()).contiguous());
    }
  });
  if (!needs_factors) {
    for (size_t i = 0; i < lora_A.size(); ++i) {
      grads_A.push_back(at::empty({0}, lora_A[i].options()));
      grads_B.push_back(at::empty({0}, lora_B[i].options()));
    }
  }
  return {needs_x ? grad_x.view(x.sizes()) : grad_x, grads_A, grads_B};
}

}  // namespace

TORCH_LIBRARY_IMPL(gauge_ext, CPU, m) {
  m.impl("lora_gather", &forward);
  m.impl("lora_gather_backward", &backward);
}

}  // namespace gauge_ext
