#include "ops/lora_embedding.h"

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "check.h"
#include "ops/cpu/columns.h"
#include "ops/cpu/low_rank.h"
#include "ops/cpu/pieces.h"
#include "ops/rows.h"

namespace gauge_ext {
namespace {

using at::Tensor;
using Padding = std::optional<int64_t>;

// Rows of y that are copied from the table and added to while they are in cache; a multiple of the
// rows of every register tile.
constexpr int64_t kCopiedRows = 24;

// The ids as int64, contiguous, all of them in the table
Tensor tokens_of(const Tensor& ids, int64_t vocab) {
  const Tensor tokens = ids.to(at::kLong).contiguous();
  const int64_t* data = tokens.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < tokens.numel(); ++n) {
    TORCH_CHECK_INDEX(data[n] >= 0 && data[n] < vocab, "ids must be in [0, ", vocab,
                      ") for a table of ", vocab, " tokens, got ", data[n]);
  }
  return tokens;
}

// (N, r): the column of A of each token, in acc_t
template <typename acc_t>
void read_columns(const Tensor& lora_A, const int64_t* tokens, int64_t count, acc_t* hidden) {
  dispatch_dtype(lora_A, "lora_A", "", [&](auto tag) {
    using factor_t = decltype(tag);
    const Strided<const factor_t> matrix{data_of<factor_t>(lora_A), lora_A.size(0),
                                         lora_A.stride(0), lora_A.stride(1)};
    gather_columns(matrix, tokens, count, hidden);
  });
}

// (r, dim), in acc_t: Bᵀ
template <typename acc_t>
Buffer<acc_t> right_of(const Tensor& lora_B) {
  const Tensor B = lora_B.to(acc_dtype<acc_t>()).contiguous();
  Buffer<acc_t> right(B.numel());
  low_rank_kernels<acc_t>().transpose(data_of<acc_t>(B), B.size(0), B.size(1), acc_t(1),
                                      right.data());
  return right;
}

Tensor forward(const Tensor& ids,
               const Tensor& weight,
               const Tensor& lora_A,
               const Tensor& lora_B,
               double scaling,
               Padding padding_idx) {
  const auto n = check_lora_embedding(ids, weight, lora_A, lora_B, padding_idx);
  const Tensor tokens = tokens_of(ids, n.vocab);
  const int64_t* token = tokens.const_data_ptr<int64_t>();
  std::vector<int64_t> shape = ids.sizes().vec();
  shape.push_back(n.dim);
  const Tensor y = at::empty(shape, weight.options());
  dispatch_dtype(
      weight, "weight", "; convert the model, for example with model.float()", [&](auto tag) {
        using scalar_t = decltype(tag);
        using acc_t = typename AccOf<scalar_t>::type;
        // A part of a wider table is read in place; a transposed one is rare.
        const Tensor table = weight.stride(1) == 1 ? weight : weight.contiguous();
        const int64_t stride = table.stride(0);
        const Buffer<acc_t> right = right_of<acc_t>(lora_B);
        const auto& kernels = low_rank_kernels<scalar_t>();
        Pieces(n.rows, n.dim * n.rank).run([&](int64_t, int64_t first, int64_t count) {
          const Buffer<acc_t> hidden(count * n.rank);
          read_columns(lora_A, token + first, count, hidden.data());
          for (int64_t row = 0; row < count; row += kCopiedRows) {
            const int64_t part = std::min(kCopiedRows, count - row);
            scalar_t* to = mutable_data_of<scalar_t>(y) + (first + row) * n.dim;
            for (int64_t i = 0; i < part; ++i) {
              std::memcpy(to + i * n.dim,
                          data_of<scalar_t>(table) + token[first + row + i] * stride,
                          static_cast<size_t>(n.dim) * sizeof(scalar_t));
            }
            kernels.expand(to, /*add=*/true, nullptr, part, n.dim, hidden.data() + row * n.rank,
                           right.data(), n.rank, static_cast<acc_t>(scaling));
          }
        });
      });
  return y;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad,
                                    const Tensor& ids,
                                    const Tensor& lora_A,
                                    const Tensor& lora_B,
                                    double scaling,
                                    Padding padding_idx,
                                    bool needs_A,
                                    bool needs_B) {
  const auto n = check_embedding_factors(ids, lora_A, lora_B, padding_idx);
  TORCH_CHECK(grad.dim() == ids.dim() + 1 && grad.size(-1) == n.dim &&
                  grad.sizes().slice(0, static_cast<size_t>(ids.dim())).equals(ids.sizes()),
              "grad must have shape [*ids, dim] = [*, ", n.dim, "] to fit ids ", ids.sizes(),
              ", got ", grad.sizes());
  const Tensor tokens = tokens_of(ids, n.vocab);
  const int64_t* token = tokens.const_data_ptr<int64_t>();
  const Tensor grads = rows_of(grad, n.rows, n.dim);
  Tensor grad_A = at::empty({0}, lora_A.options()), grad_B = at::empty({0}, lora_B.options());
  dispatch_dtype(grad, "grad", "", [&](auto tag) {
    using scalar_t = decltype(tag);
    using acc_t = typename AccOf<scalar_t>::type;
    const auto wide = grad.options().dtype(acc_dtype<acc_t>());
    const Buffer<acc_t> right = right_of<acc_t>(lora_B);
    const Buffer<acc_t> hidden(n.rows * n.rank), grad_hidden(n.rows * n.rank);
    const Pieces pieces(n.rows, 2 * n.dim * n.rank);
    // For each piece of rows its part of the transposed gradient of B over s
    const Tensor sums = at::zeros({std::max<int64_t>(pieces.count, 1), n.rank, n.dim}, wide);
    acc_t* sum = mutable_data_of<acc_t>(sums);
    pieces.run([&](int64_t piece, int64_t first, int64_t count) {
      acc_t* own = hidden.data() + first * n.rank;
      read_columns(lora_A, token + first, count, own);
      low_rank_kernels<scalar_t>().project_reduce(
          data_of<scalar_t>(grads) + first * n.dim, count, n.dim, right.data(), own, n.rank,
          grad_hidden.data() + first * n.rank, sum + piece * n.rank * n.dim);
    });
    const auto scale = static_cast<acc_t>(scaling);
    if (needs_A) {
      // A token's rows are added in their order, whichever thread does it.
      const Tensor total = at::zeros({n.rank, n.vocab}, wide);
      const Strided<acc_t> to{mutable_data_of<acc_t>(total), n.rank, n.vocab, 1};
      Pieces(n.rank, n.rows).run([&](int64_t, int64_t first, int64_t count) {
        scatter_columns(grad_hidden.data(), token, n.rows, scale, padding_idx.value_or(-1), first,
                        first + count, to);
      });
      grad_A = total.to(lora_A.scalar_type());
    }
    if (needs_B) {
      for (int64_t piece = 1; piece < pieces.count; ++piece) {
        for (int64_t k = 0; k < n.rank * n.dim; ++k) {
          sum[k] += sum[piece * n.rank * n.dim + k];
        }
      }
      const Tensor total = at::empty({n.dim, n.rank}, wide);
      low_rank_kernels<acc_t>().transpose(sum, n.rank, n.dim, scale, mutable_data_of<acc_t>(total));
      grad_B = total.to(lora_B.scalar_type());
    }
  });
  return {grad_A, grad_B};
}

}  // namespace

TORCH_LIBRARY_IMPL(gauge_ext, CPU, m) {
  m.impl("lora_embedding", &forward);
  m.impl("lora_embedding_backward", &backward);
}

}  // namespace gauge_ext
