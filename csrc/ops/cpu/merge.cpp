#include "ops/merge.h"

#include <algorithm>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "ops/cpu/pieces.h"
#include "ops/cpu/rank_update.h"

namespace gauge_ext {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Below about this many multiply-adds a second thread costs more than it brings.
constexpr int64_t kGrain = 1 << 16;

// Asks for huge pages where `tensor` lies. A weight that nobody has written to yet has no memory:
// to get it in pages of 4 KB, each a fault, takes several times as long as to merge. It is advice:
// where the system has no such pages, or the memory is a file's, nothing happens.
void advise_huge_pages([[maybe_unused]] const Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  const auto from = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t begin = (from + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (from + tensor.nbytes()) / kHugePage * kHugePage;
  if (tensor.is_contiguous() && begin < end) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
}

template <typename scalar_t>
UpdateSums merge_one(const MergeSizes& n,
                     const Tensor& out,
                     const Tensor& weight,
                     const Tensor& left,
                     const Tensor& right,
                     const Rounding* rounding,
                     bool fidelity) {
  using acc_t = typename AccOf<scalar_t>::type;
  const auto& kernels = rank_update_kernels<scalar_t>();
  const auto* from = static_cast<const scalar_t*>(weight.const_data_ptr());
  auto* to = static_cast<scalar_t*>(out.mutable_data_ptr());
  const auto* l = static_cast<const acc_t*>(left.const_data_ptr());
  const auto* r = static_cast<const acc_t*>(right.const_data_ptr());
  // Rows are cut into at most one piece a thread. What is written to a row depends on nothing else;
  // the sums are added up in order.
  const int64_t worthwhile = std::max<int64_t>(n.rows * n.columns * (n.rank + 1) / kGrain, 1);
  const int64_t count = std::min<int64_t>({at::get_num_threads(), worthwhile, n.rows});
  std::vector<UpdateSums> sums(static_cast<size_t>(count));
  const int64_t size = count > 0 ? (n.rows + count - 1) / count : 0;
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t first = piece * size;
      kernels.update(from, weight.stride(0), to, out.stride(0), first,
                     std::clamp<int64_t>(n.rows - first, 0, size), n.columns, l, r, n.rank,
                     rounding, fidelity, sums[piece]);
    }
  });
  UpdateSums total;
  for (const auto& part : sums) {
    total.delta += part.delta;
    total.kept += part.kept;
    total.lost += part.lost;
    total.finite = total.finite && part.finite;
  }
  return total;
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
  for (const Tensor& one : weight) {  // all of them before the first is written
    dispatch_storage(one, "weight", [](auto) {});
  }
  const Tensor result = at::zeros({static_cast<int64_t>(weight.size()), 4}, at::kDouble);
  auto* row = result.mutable_data_ptr<double>();
  for (size_t i = 0; i < weight.size(); ++i, row += 4) {
    const Rounding rounding = {seed.has_value() ? static_cast<uint64_t>(seed->item<int64_t>()) : 0,
                               static_cast<uint32_t>(i), first_row};
    if (!out[i].is_same(weight[i])) {
      advise_huge_pages(out[i]);
    }
    const auto sums = dispatch_storage(weight[i], "weight", [&](auto tag) {
      using scalar_t = decltype(tag);
      const auto dtype = std::is_same_v<scalar_t, double> ? at::kDouble : at::kFloat;
      const MergeFactors factors(lora_A[i], lora_B[i], scaling[i], transposed[i], dtype);
      return merge_one<scalar_t>(sizes[i], out[i], weight[i], factors.left, factors.right,
                                 seed.has_value() ? &rounding : nullptr, fidelity);
    });
    mark_written(out[i]);
    row[0] = sums.finite ? 1.0 : 0.0;
    row[1] = sums.delta;
    row[2] = sums.kept;
    row[3] = sums.lost;
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(gauge_ext, CPU, m) {
  m.impl("merge_", &merge_in_place<&merge_out>);
  m.impl("merge_out", &merge_out);
}

}  // namespace gauge_ext
