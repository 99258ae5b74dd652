#pragma once

// The kernels of low_rank.h on tensors: allocates what they write and launches them on the current
// stream. N is the number of rows, r a rank; (N, r) tensors are in acc_t.

#include <tuple>

#include <ATen/ops/empty.h>

#include "ops/cuda/launch.h"

namespace gauge_ext::cuda {

template <typename scalar_t>
struct LowRankCall {
  using acc_t = typename AccOf<scalar_t>::type;

  const LowRankKernels<scalar_t>& kernels = low_rank_kernels<scalar_t>();
  Stream stream = current_stream();

  static at::TensorOptions wide(const at::Tensor& like) {
    return like.options().dtype(acc_dtype<acc_t>());
  }

  // H = scale · (rows ∘ M) rightᵀ, (N, r), for rows (N, columns) and right (r, columns)
  at::Tensor project(const at::Tensor& rows,
                     const at::Tensor& right,
                     const DropoutSource& dropout,
                     double scale) const {
    const int64_t n = rows.size(0), rank = right.size(0);
    const at::Tensor hidden = at::empty({n, rank}, wide(rows));
    const at::Tensor partial =
        at::empty({kernels.projected_size(n, rows.size(1), rank)}, wide(rows));
    kernels.project(matrix<scalar_t>(rows), factor(right), rank, dropout, static_cast<acc_t>(scale),
                    mutable_data_of<acc_t>(hidden), mutable_data_of<acc_t>(partial), stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return hidden;
  }

  // Y = bias + scale · (left right) ∘ M, (N, columns) in the storage type
  at::Tensor expand(const at::TensorOptions& options,
                    const std::optional<at::Tensor>& bias,
                    const at::Tensor& left,
                    const at::Tensor& right,
                    const DropoutSource& dropout,
                    double scale) const {
    const at::Tensor y = at::empty({left.size(0), right.size(1)}, options);
    const at::Tensor dense = bias.has_value() ? bias->contiguous() : at::Tensor();
    kernels.expand({mutable_data_of<scalar_t>(y), y.size(0), y.size(1)}, /*add=*/false,
                   bias.has_value() ? data_of<scalar_t>(dense) : nullptr, data_of<acc_t>(left),
                   factor(right), right.size(0), dropout, static_cast<acc_t>(scale), stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return y;
  }

  // grad_hidden = s · grad B, (N, r), and grad_B = s · gradᵀ hidden, (out, r), in one pass
  std::tuple<at::Tensor, at::Tensor> backward_output(const at::Tensor& grad,
                                                     const at::Tensor& hidden,
                                                     const at::Tensor& lora_B,
                                                     double scaling) const {
    const int64_t n = grad.size(0), out = grad.size(1), rank = lora_B.size(1);
    const at::Tensor left = hidden.to(acc_dtype<acc_t>()).contiguous();
    const at::Tensor grad_hidden = at::empty({n, rank}, wide(grad));
    const at::Tensor grad_B = at::empty({out, rank}, lora_B.options());
    const at::Tensor partial = at::empty({kernels.project_reduced_size(n, out, rank)}, wide(grad));
    kernels.project_reduce(matrix<scalar_t>(grad), factor(lora_B.t()), data_of<acc_t>(left), rank,
                           static_cast<acc_t>(scaling), mutable_data_of<acc_t>(grad_hidden),
                           mutable_factor(grad_B.t()), mutable_data_of<acc_t>(partial), stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return {grad_hidden, grad_B};
  }

  // grad_A = grad_hiddenᵀ (x ∘ M), (r, in) in lora_A's dtype, the mask drawn again
  at::Tensor backward_A(const at::Tensor& x,
                        const at::Tensor& grad_hidden,
                        const at::TensorOptions& options,
                        const DropoutSource& dropout) const {
    const int64_t rank = grad_hidden.size(1), in = x.size(1);
    const at::Tensor grad_A = at::empty({rank, in}, options);
    const at::Tensor partial = at::empty({kernels.reduced_size(x.size(0), in, rank)}, wide(x));
    kernels.reduce(matrix<scalar_t>(x), data_of<acc_t>(grad_hidden), rank, dropout, acc_t(1),
                   mutable_factor(grad_A), mutable_data_of<acc_t>(partial), stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return grad_A;
  }
};

}  // namespace gauge_ext::cuda
