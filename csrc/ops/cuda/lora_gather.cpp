// lora_gather on CUDA tensors. The rows are sorted on the device; the large products are torch's.

#include "ops/lora_gather.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops/cuda/gather.h"
#include "ops/cuda/launch.h"
#include "ops/cuda/upload.h"
#include "ops/rows.h"

namespace gauge_ext::cuda {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// An index that lies on the host is looked at there, where a wrong one can be told without waiting.
Tensor index_on_device(const Tensor& index, const Tensor& x, int64_t adapters) {
  const Tensor dense = index.contiguous();
  if (dense.is_cpu()) {
    const int64_t* entries = dense.const_data_ptr<int64_t>();
    check_entries({entries, static_cast<size_t>(dense.numel())}, adapters);
    const Tensor there = at::empty(dense.sizes(), x.options().dtype(at::kLong));
    upload(entries, 8 * dense.numel(), there.mutable_data_ptr(), current_stream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return there;
  }
  TORCH_CHECK(dense.device() == x.device(), "index must be on the CPU or on x's device, ",
              x.device(), ", got ", dense.device());
  return dense;
}

// What the kernels need to know of a call, on the device. The tensors own what the rest points to.
template <typename scalar_t>
struct GatherCall {
  using acc_t = typename AccOf<scalar_t>::type;

  const GatherKernels<scalar_t>& kernels = gather_kernels<scalar_t>();
  Stream stream = current_stream();
  at::TensorOptions wide;
  std::vector<Tensor> A, B;
  Tensor index, starts, order, table;
  GatherRows plan;
  const GatherAdapter* adapters = nullptr;
  Type type = Type::kFloat;
  int64_t max_rank = 0;

  GatherCall(const LoraGatherSizes& n,
             const Tensor& x,
             at::TensorList lora_A,
             at::TensorList lora_B,
             const std::vector<Tensor>& grads_A,
             const std::vector<Tensor>& grads_B,
             at::ArrayRef<double> scaling,
             const Tensor& given_index)
      : wide(x.options().dtype(acc_dtype<acc_t>())) {
    const auto count = static_cast<int64_t>(lora_A.size());
    const auto integers = x.options().dtype(at::kLong);
    index = index_on_device(given_index, x, count);
    starts = at::empty({count + 2}, integers);
    order = at::empty({index.numel()}, integers);
    plan_gather(index.const_data_ptr<int64_t>(), index.numel(), count,
                starts.mutable_data_ptr<int64_t>(), order.mutable_data_ptr<int64_t>(), stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    plan = {n.rows, n.rows_each, count, starts.const_data_ptr<int64_t>(),
            order.const_data_ptr<int64_t>()};
    std::vector<GatherAdapter> rows;
    for (size_t i = 0; i < lora_A.size(); ++i) {
      A.push_back(lora_A[i].contiguous());
      B.push_back(lora_B[i].contiguous());
      rows.push_back({A[i].const_data_ptr(), B[i].const_data_ptr(),
                      grads_A.empty() ? nullptr : grads_A[i].mutable_data_ptr(),
                      grads_B.empty() ? nullptr : grads_B[i].mutable_data_ptr(), A[i].size(0),
                      scaling[i]});
      max_rank = std::max(max_rank, A[i].size(0));
      type = type_of(A[i]);
    }
    const auto bytes = static_cast<int64_t>(rows.size() * sizeof(GatherAdapter));
    table = at::empty({bytes}, x.options().dtype(at::kByte));
    upload(rows.data(), bytes, table.mutable_data_ptr(), stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    adapters = static_cast<const GatherAdapter*>(table.const_data_ptr());
  }

  // s · rows Aᵀ or s · rows B, (N, max_rank)
  Tensor project(const Tensor& rows, Side side) const {
    const int64_t n = rows.size(0);
    const Tensor hidden = at::empty({n, max_rank}, wide);
    const Tensor partial =
        at::empty({kernels.projected_size(n, rows.size(1), plan.adapters, max_rank)}, wide);
    kernels.project(matrix<scalar_t>(rows), plan, adapters, type, side, max_rank,
                    mutable_data_of<acc_t>(hidden), mutable_data_of<acc_t>(partial), stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return hidden;
  }

  Tensor expand(const at::TensorOptions& options,
                int64_t columns,
                const OptionalTensor& bias,
                const Tensor& hidden,
                Side side) const {
    const Tensor y = at::empty({plan.rows, columns}, options);
    const Tensor dense = bias.has_value() ? bias->contiguous() : Tensor();
    kernels.expand({mutable_data_of<scalar_t>(y), y.size(0), y.size(1)},
                   bias.has_value() ? data_of<scalar_t>(dense) : nullptr, data_of<acc_t>(hidden),
                   plan, adapters, type, side, max_rank, stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return y;
  }

  void reduce(const Tensor& rows, const Tensor& hidden, Side side) const {
    kernels.reduce(matrix<scalar_t>(rows), data_of<acc_t>(hidden), plan, adapters, type, side,
                   max_rank, stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

// The low-rank part is written first, with the bias, and torch's product added onto it.
Tensor forward(const Tensor& x,
               const Tensor& weight,
               const OptionalTensor& bias,
               at::TensorList lora_A,
               at::TensorList lora_B,
               at::ArrayRef<double> scaling,
               const Tensor& index) {
  const auto n = check_lora_gather(x, weight, bias, lora_A, lora_B, scaling, index);
  const auto guard = guard_of(x);
  const Tensor rows = rows_of(x, n.rows, n.in_features);
  const Tensor y = dispatch(x, "x", [&](auto tag) {
    const GatherCall<typename decltype(tag)::type> call(n, x, lora_A, lora_B, {}, {}, scaling,
                                                        index);
    const Tensor hidden = call.project(rows, Side::kA);
    return call.expand(x.options(), n.out_features, bias, hidden, Side::kB);
  });
  y.addmm_(rows, weight.t());
  return y.view(output_shape(x, n.out_features));
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
  const auto guard = guard_of(x);
  const Tensor grads = rows_of(grad, n.rows, n.out_features);
  const Tensor rows = rows_of(x, n.rows, n.in_features);
  std::vector<Tensor> grads_A, grads_B;
  for (size_t i = 0; i < lora_A.size(); ++i) {
    grads_A.push_back(
        at::empty(needs_factors ? lora_A[i].sizes() : at::IntArrayRef{0}, lora_A[i].options()));
    grads_B.push_back(
        at::empty(needs_factors ? lora_B[i].sizes() : at::IntArrayRef{0}, lora_B[i].options()));
  }
  Tensor grad_x = at::empty({0}, x.options());
  dispatch(x, "x", [&](auto tag) {
    const GatherCall<typename decltype(tag)::type> call(n, x, lora_A, lora_B, grads_A, grads_B,
                                                        scaling, index);
    const Tensor grad_hidden = call.project(grads, Side::kB);
    if (needs_factors) {
      call.reduce(grads, call.project(rows, Side::kA), Side::kB);
      call.reduce(rows, grad_hidden, Side::kA);
    }
    if (needs_x) {
      grad_x = call.expand(x.options(), n.in_features, std::nullopt, grad_hidden, Side::kA);
    }
  });
  if (needs_x) {
    grad_x = grad_x.addmm_(grads, weight).view(x.sizes());
  }
  return {grad_x, grads_A, grads_B};
}

}  // namespace

TORCH_LIBRARY_IMPL(gauge_ext, CUDA, m) {
  m.impl("lora_gather", &forward);
  m.impl("lora_gather_backward", &backward);
}

}  // namespace gauge_ext::cuda
