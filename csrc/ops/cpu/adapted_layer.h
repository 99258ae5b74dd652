#pragma once

// One adapted layer on rows in acc_t: what lora_linear and lora_linear_group are made of on the
// CPU.

#include <cstdint>
#include <optional>

#include <ATen/core/Tensor.h>

#include "math/dropout.h"
#include "ops/cpu/gemm.h"
#include "ops/cpu/low_rank.h"
#include "ops/cpu/pieces.h"
#include "ops/lora_linear.h"

namespace gauge_ext {

// The tensors of a layer and what they are converted to. The rows of x, y and their gradients are
// in acc_t; the weight is in scalar_t, and converted, or merged with the update, as it is needed.
template <typename scalar_t>
class AdaptedLayer {
 public:
  using acc_t = typename AccOf<scalar_t>::type;

  AdaptedLayer(const LoraLinearSizes& sizes,
               const at::Tensor& weight,
               const std::optional<at::Tensor>& bias,
               const at::Tensor& lora_A,
               const at::Tensor& lora_B,
               double scaling,
               const Dropout& dropout);

  const LoraLinearSizes& sizes() const { return n_; }

  // y = x Wᵀ + b + s·(x ∘ M) Aᵀ Bᵀ for rows that start at first_row of the whole x. `hidden`,
  // (rows, r), receives (x ∘ M) Aᵀ; where it is null nobody wants it.
  void forward(const acc_t* x, int64_t first_row, int64_t rows, acc_t* hidden, acc_t* y);

  // Where the gradients of the factors are summed up: a part for each piece of rows.
  struct Sums {
    at::Tensor A;          // (r, in), gradient of A: the first piece's part, at last the sum
    Buffer<acc_t> rest_A;  // (pieces - 1, r, in), the other pieces'
    Buffer<acc_t> B;       // (pieces, r, out), transposed gradient of B over s
    int64_t pieces = 0;
  };
  // Zeros, for calls of backward with so many rows at most.
  Sums sums(int64_t rows, bool needs_x, bool needs_A, bool needs_B) const;

  // Adds to `sums`, and writes grad_x, (rows, in), or, where `add`, adds to it; null: not wanted.
  void backward(const acc_t* grad,
                const acc_t* x,
                int64_t first_row,
                int64_t rows,
                const acc_t* hidden,
                const Sums& sums,
                acc_t* grad_x,
                bool add);

  at::Tensor grad_A(const Sums& sums) const;
  at::Tensor grad_B(const Sums& sums) const;

 private:
  bool merges_backward() const;
  // body(first row of W, rows of W, that part of W or W + s·B·A), part by part
  template <typename F>
  void for_weight(bool merged, const F& body);

  LoraLinearSizes n_;
  at::Tensor weight_, bias_, A_, B_;      // as they came, contiguous
  int64_t weight_rows_, weight_columns_;  // strides
  acc_t scaling_;
  Dropout dropout_;
  Buffer<acc_t> wide_A_, wide_bias_;
  Buffer<acc_t> right_;  // (r, out): s·Bᵀ
  const acc_t* a_;
  const acc_t* bias_data_;
  Buffer<acc_t> converted_;  // of the weight, whole or a part
  int64_t converted_rows_ = 0;
  bool converted_merged_ = false;
};

}  // namespace gauge_ext
