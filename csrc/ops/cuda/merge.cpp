// merge_ and merge_out on CUDA tensors. The result stays on the device: who reads it waits, once
// for all weights of the call.

#include "ops/merge.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "ops/cuda/launch.h"
#include "ops/cuda/rank_update.h"

namespace gauge_ext::cuda {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <typename scalar_t>
void merge_one(const MergeSizes& n,
               const Tensor& out,
               const Tensor& weight,
               const Tensor& left,
               const Tensor& right,
               const SeedSource* seed,
               int64_t layer,
               int64_t first_row,
               bool fidelity,
               double* result) {
  using acc_t = typename AccOf<scalar_t>::type;
  const Tensor partial = at::empty({rank_update_size<scalar_t>(n.rows, n.columns)},
                                   weight.options().dtype(at::kDouble));
  RankUpdate<scalar_t> update = {};
  update.weight = data_of<scalar_t>(weight);
  update.weight_stride = weight.stride(0);
  update.out = mutable_data_of<scalar_t>(out);
  update.out_stride = out.stride(0);
  update.rows = n.rows;
  update.columns = n.columns;
  update.left = data_of<acc_t>(left);
  update.right = data_of<acc_t>(right);
  update.rank = n.rank;
  update.stochastic = seed != nullptr;
  if (seed != nullptr) {
    update.rounding = {seed->value, static_cast<uint32_t>(layer), first_row};
    update.seed = seed->device;
  }
  update.fidelity = fidelity;
  update.result = result;
  update.partial = mutable_data_of<double>(partial);
  rank_update(update, current_stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor merge_out(at::TensorList weight,
                 at::TensorList lora_A,
                 at::TensorList lora_B,
                 at::ArrayRef<double> scaling,
                 const c10::List<bool>& transposed,
                 const OptionalTensor& seed,
                 int64_t first_row,
                 bool fidelity,
                 at::TensorList out) {
  const auto sizes = check_merge(out, weight, lora_A, lora_B, scaling, transposed, seed, first_row);
  const auto count = static_cast<int64_t>(weight.size());
  TORCH_CHECK(count > 0, "weight must have at least one entry, got an empty list");
  for (size_t i = 0; i < weight.size(); ++i) {  // all of them before the first is written
    TORCH_CHECK(weight[i].device() == weight[0].device() && out[i].device() == weight[i].device(),
                "the weights of one call must be on one device, ", weight[0].device(), ", got ",
                weight[i].device(), " in weight[", i, "] and ", out[i].device(), " in out[", i,
                "]");
    dispatch(weight[i], "weight", [](auto) {});
  }
  const auto guard = guard_of(weight[0]);
  const SeedSource source = seed_source(weight[0], seed);
  const Tensor result = at::zeros({count, 4}, weight[0].options().dtype(at::kDouble));
  result.select(1, 0).fill_(1.0);  // what a weight without entries is
  for (size_t i = 0; i < weight.size(); ++i) {
    dispatch(weight[i], "weight", [&](auto tag) {
      using scalar_t = typename decltype(tag)::type;
      const auto dtype = acc_dtype<typename AccOf<scalar_t>::type>();
      const MergeFactors factors(lora_A[i], lora_B[i], scaling[i], transposed[i], dtype);
      merge_one<scalar_t>(sizes[i], out[i], weight[i], factors.left, factors.right,
                          seed.has_value() ? &source : nullptr, static_cast<int64_t>(i), first_row,
                          fidelity, mutable_data_of<double>(result) + 4 * i);
    });
    mark_written(out[i]);
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(gauge_ext, CUDA, m) {
  m.impl("merge_", &merge_in_place<&merge_out>);
  m.impl("merge_out", &merge_out);
}

}  // namespace gauge_ext::cuda
