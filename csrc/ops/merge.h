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

// Checks every argument of merge_out, so that nothing is written where one does not fit, and
// returns the sizes of each weight.
std::vector<MergeSizes> check_merge(at::TensorList out,
                                    at::TensorList weight,
                                    at::TensorList lora_A,
                                    at::TensorList lora_B,
                                    at::ArrayRef<double> scaling,
                                    const c10::List<bool>& transposed,
                                    const std::optional<at::Tensor>& seed,
                                    int64_t first_row);

// s·B A = L R as the weight lies, (out, in), or (in, out) where it is transposed; contiguous.
struct MergeFactors {
  at::Tensor left, right;

  MergeFactors(const at::Tensor& lora_A,
               const at::Tensor& lora_B,
               double scaling,
               bool transposed,
               at::ScalarType dtype);
};

// Tells autograd that `out`, which a graph may have saved, has changed.
void mark_written(const at::Tensor& out);

// merge_ by way of a device's merge_out
template <auto merge_out>
at::Tensor merge_in_place(at::TensorList weight,
                          at::TensorList lora_A,
                          at::TensorList lora_B,
                          at::ArrayRef<double> scaling,
                          const c10::List<bool>& transposed,
                          const std::optional<at::Tensor>& seed,
                          int64_t first_row,
                          bool fidelity) {
  return merge_out(weight, lora_A, lora_B, scaling, transposed, seed, first_row, fidelity, weight);
}

}  // namespace gauge_ext
