#pragma once

// merge_: W += s·B A for many weights in one call; merge_out: the same into other tensors.
//
// The arguments are lists of one length. weight[i] is (out, in), or (in, out) where transposed[i];
// lora_A[i] is (r, in), lora_B[i] is (out, r). Returns (n, 4) float64 on the weights' device: for
// each weight whether all of it is finite now (1 or 0), and the sums of D², K² and (D - K)², where
// D is the update and K what the weight really changed by after rounding; zeros where `fidelity` is
// off.

#include <optional>
#include <vector>

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

namespace gauge_ext {

struct MergeSizes {
  int64_t rows;     // of the weight as it lies in memory
  int64_t columns;  // of the weight as it lies in memory
  int64_t rank;
};

// Checks that the lists have one length, and the arguments that all weights share.
void check_merge(at::TensorList out,
                 at::TensorList weight,
                 at::TensorList lora_A,
                 at::TensorList lora_B,
                 at::ArrayRef<double> scaling,
                 const c10::List<bool>& transposed,
                 const std::optional<at::Tensor>& seed,
                 int64_t first_row);

// Checks the i-th arguments and returns the sizes.
MergeSizes check_merge_of(size_t i,
                          const at::Tensor& out,
                          const at::Tensor& weight,
                          const at::Tensor& lora_A,
                          const at::Tensor& lora_B,
                          bool transposed,
                          bool stochastic);

}  // namespace gauge_ext
