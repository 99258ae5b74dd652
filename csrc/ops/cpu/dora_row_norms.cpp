#include "ops/dora_row_norms.h"

#include <algorithm>
#include <cmath>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops/cpu/pieces.h"
#include "ops/cpu/row_norms.h"

namespace gauge_ext {
namespace {

using at::Tensor;

// The outputs are dealt out to threads by so many: whole vectors of every type.
constexpr int64_t kOutputs = 32;

Tensor row_norms(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling) {
  const auto n = check_dora_row_norms(weight, lora_A, lora_B);
  const auto wide = row_norm_dtype(weight, lora_A, lora_B);
  Tensor w = wide == at::kDouble ? weight.to(wide) : weight;
  // Rows or columns of it lie together.
  const bool transposed = w.stride(1) != 1 && w.stride(0) == 1;
  if (!transposed && w.stride(1) != 1) {
    w = w.contiguous();
  }
  // s·B A, or its transpose, is scale · L R.
  const Tensor left = (transposed ? lora_A.t() : lora_B).to(wide).contiguous();
  const Tensor right = (transposed ? lora_B.t() : lora_A).to(wide).contiguous();
  const Tensor norms = at::empty({n.out_features}, w.options().dtype(wide));
  const Buffer<double> totals(std::max<int64_t>(n.out_features, 1));
  std::fill_n(totals.data(), n.out_features, 0.0);
  dispatch_storage(w, "weight", [&](auto tag) {
    using scalar_t = decltype(tag);
    using acc_t = typename AccOf<scalar_t>::type;
    const auto& kernels = row_norm_kernels<scalar_t>();
    const auto* from = data_of<scalar_t>(w);
    const auto *l = data_of<acc_t>(left), *r = data_of<acc_t>(right);
    const auto scale = static_cast<acc_t>(scaling);
    auto* to = mutable_data_of<acc_t>(norms);
    const int64_t groups = (n.out_features + kOutputs - 1) / kOutputs;
    Pieces(groups, kOutputs * n.in_features * (n.rank + 1))
        .run([&](int64_t, int64_t group, int64_t count) {
          const int64_t first = group * kOutputs;
          const int64_t outputs = std::min(count * kOutputs, n.out_features - first);
          double* sums = totals.data() + first;
          if (transposed) {
            kernels.columns(from + first, w.stride(1), n.in_features, outputs, l, r + first,
                            n.out_features, n.rank, scale, sums);
          } else {
            kernels.rows(from + first * w.stride(0), w.stride(0), outputs, n.in_features,
                         l + first * n.rank, r, n.rank, scale, sums);
          }
          for (int64_t i = 0; i < outputs; ++i) {
            to[first + i] = static_cast<acc_t>(std::sqrt(sums[i]));
          }
        });
  });
  return norms;
}

}  // namespace

TORCH_LIBRARY_IMPL(gauge_ext, CPU, m) {
  m.impl("dora_row_norms", &row_norms);
}

}  // namespace gauge_ext
