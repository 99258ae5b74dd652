#include "ops/lora_linear.h"

#include <algorithm>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "ops/cpu/low_rank.h"

namespace gauge_ext {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Below about this many multiply-adds a second thread costs more than it brings.
constexpr int64_t kGrain = 1 << 16;

// Calls body with a value of the storage type that stands for x's dtype.
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

template <typename scalar_t>
constexpr at::ScalarType acc_dtype() {
  return std::is_same_v<scalar_t, double> ? at::kDouble : at::kFloat;
}

Dropout make_dropout(double dropout_p, const OptionalTensor& seed) {
  return dropout_p > 0.0 ? Dropout::make(dropout_p, static_cast<uint64_t>(seed->item<int64_t>()))
                         : Dropout();
}

// Rows are cut into at most one piece a thread; the pieces depend on sizes and thread count alone,
// so that sums over pieces, taken in order, come out the same each time.
struct Pieces {
  int64_t rows;
  int64_t size;
  int64_t count;

  Pieces(int64_t rows, int64_t work_per_row) : rows(rows) {
    const int64_t worthwhile = std::max<int64_t>(rows * work_per_row / kGrain, 1);
    const int64_t wanted = std::min<int64_t>({at::get_num_threads(), worthwhile, rows});
    size = wanted > 0 ? (rows + wanted - 1) / wanted : 0;
    count = size > 0 ? (rows + size - 1) / size : 0;
  }

  // body(piece, first row, rows of the piece)
  template <typename F>
  void run(const F& body) const {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t first = piece * size;
        body(piece, first, std::min(size, rows - first));
      }
    });
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& x,
                                   const Tensor& weight,
                                   const OptionalTensor& bias,
                                   const Tensor& lora_A,
                                   const Tensor& lora_B,
                                   double scaling,
                                   double dropout_p,
                                   const OptionalTensor& seed) {
  const auto [rows, in_features, out_features, rank] =
      check_lora_linear(x, weight, bias, lora_A, lora_B, dropout_p, seed);
  return dispatch_dtype(
      x,
      [&, rows = rows, in_features = in_features, out_features = out_features,
       rank = rank](auto tag) -> std::tuple<Tensor, Tensor> {
        using scalar_t = decltype(tag);
        using acc_t = typename AccOf<scalar_t>::type;
        const Dropout dropout = make_dropout(dropout_p, seed);
        const auto& kernels = low_rank_kernels<scalar_t>();

        const Tensor x_rows = x.contiguous();
        const Tensor y = at::linear(x_rows, weight, bias).contiguous();
        const Tensor right_A = lora_A.to(acc_dtype<scalar_t>()).contiguous();      // (r, in)
        const Tensor right_B = lora_B.to(acc_dtype<scalar_t>()).t().contiguous();  // (r, out)
        const Tensor hidden = at::empty({rows, rank}, right_A.options());

        const auto* x_data = static_cast<const scalar_t*>(x_rows.const_data_ptr());
        auto* y_data = static_cast<scalar_t*>(y.mutable_data_ptr());
        const acc_t* A_data = right_A.const_data_ptr<acc_t>();
        const acc_t* B_data = right_B.const_data_ptr<acc_t>();
        acc_t* hidden_data = hidden.mutable_data_ptr<acc_t>();
        Pieces(rows, (in_features + out_features) * rank)
            .run([&](int64_t, int64_t first, int64_t count) {
              acc_t* h = hidden_data + first * rank;
              kernels.project(x_data + first * in_features, first, count, in_features, A_data, rank,
                              dropout, h);
              kernels.update(y_data + first * out_features, count, out_features, h, B_data, rank,
                             static_cast<acc_t>(scaling));
            });
        return {y, hidden};
      });
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad,
                                            const Tensor& x,
                                            const Tensor& weight,
                                            const Tensor& lora_A,
                                            const Tensor& lora_B,
                                            const Tensor& hidden,
                                            double scaling,
                                            double dropout_p,
                                            const OptionalTensor& seed,
                                            bool needs_x,
                                            bool needs_A,
                                            bool needs_B) {
  const auto [rows, in_features, out_features, rank] =
      check_lora_linear(x, weight, std::nullopt, lora_A, lora_B, dropout_p, seed);
  TORCH_CHECK(
      grad.dim() == x.dim() && grad.size(-1) == out_features && grad.numel() == rows * out_features,
      "grad must have shape [*batch, out] = [*, ", out_features, "] to fit x ", x.sizes(), ", got ",
      grad.sizes());
  return dispatch_dtype(
      x,
      [&, rows = rows, in_features = in_features, out_features = out_features,
       rank = rank](auto tag) -> std::tuple<Tensor, Tensor, Tensor> {
        using scalar_t = decltype(tag);
        using acc_t = typename AccOf<scalar_t>::type;
        const Dropout dropout = make_dropout(dropout_p, seed);
        const auto& kernels = low_rank_kernels<scalar_t>();

        const Tensor grad_rows = grad.contiguous().view({rows, out_features});
        const Tensor x_rows = x.contiguous();
        const Tensor right_A = lora_A.to(acc_dtype<scalar_t>()).contiguous();      // (r, in)
        const Tensor right_B = lora_B.to(acc_dtype<scalar_t>()).t().contiguous();  // (r, out)
        const Tensor left = hidden.to(acc_dtype<scalar_t>()).contiguous();         // (N, r)
        const auto options = right_A.options();
        const Pieces pieces(rows, (in_features + out_features) * rank);

        // One pass over g: s·g B, (N, r), and the sums of gᵀ h over each piece, kept as (r, out).
        const Tensor grad_hidden = at::empty({rows, rank}, options);
        const Tensor sums_B = at::zeros({pieces.count, rank, out_features}, options);
        {
          const auto* g_data = static_cast<const scalar_t*>(grad_rows.const_data_ptr());
          const acc_t* B_data = right_B.const_data_ptr<acc_t>();
          const acc_t* left_data = left.const_data_ptr<acc_t>();
          acc_t* grad_hidden_data = grad_hidden.mutable_data_ptr<acc_t>();
          acc_t* sums_data = sums_B.mutable_data_ptr<acc_t>();
          const auto scale = static_cast<acc_t>(scaling);
          pieces.run([&](int64_t piece, int64_t first, int64_t count) {
            acc_t* gh = grad_hidden_data + first * rank;
            if (needs_B) {
              kernels.project_reduce(g_data + first * out_features, count, out_features, B_data,
                                     left_data + first * rank, rank, gh,
                                     sums_data + piece * rank * out_features);
            } else {
              kernels.project(g_data + first * out_features, first, count, out_features, B_data,
                              rank, Dropout(), gh);
            }
            for (int64_t i = 0; i < count * rank; ++i) {
              gh[i] *= scale;
            }
          });
        }

        // One pass over x and dx: dx = g W + (s·g B A) ∘ M, and the sums of dA = (s·g B)ᵀ (x ∘ M).
        const Tensor grad_x = needs_x ? at::mm(grad_rows, weight) : at::empty({0}, x.options());
        const Tensor sums_A = at::zeros({pieces.count, rank, in_features}, options);
        if (needs_x || needs_A) {
          const auto* x_data = static_cast<const scalar_t*>(x_rows.const_data_ptr());
          auto* grad_x_data = needs_x ? static_cast<scalar_t*>(grad_x.mutable_data_ptr()) : nullptr;
          const acc_t* A_data = right_A.const_data_ptr<acc_t>();
          const acc_t* grad_hidden_data = grad_hidden.const_data_ptr<acc_t>();
          acc_t* sums_data = sums_A.mutable_data_ptr<acc_t>();
          pieces.run([&](int64_t piece, int64_t first, int64_t count) {
            kernels.update_reduce(x_data + first * in_features,
                                  needs_x ? grad_x_data + first * in_features : nullptr, first,
                                  count, in_features, grad_hidden_data + first * rank, A_data, rank,
                                  dropout, sums_data + piece * rank * in_features);
          });
        }

        const Tensor grad_A =
            needs_A ? sums_A.sum(0).to(lora_A.scalar_type()) : at::empty({0}, lora_A.options());
        const Tensor grad_B =
            needs_B ? (sums_B.sum(0).t() * scaling).to(lora_B.scalar_type()).contiguous()
                    : at::empty({0}, lora_B.options());
        return {needs_x ? grad_x.view(x.sizes()) : grad_x, grad_A, grad_B};
      });
}

Tensor lora_linear(const Tensor& x,
                   const Tensor& weight,
                   const OptionalTensor& bias,
                   const Tensor& lora_A,
                   const Tensor& lora_B,
                   double scaling,
                   double dropout_p,
                   const OptionalTensor& seed) {
  return std::get<0>(forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed));
}

Tensor dropout_mask(const Tensor& x, double dropout_p, const Tensor& seed) {
  TORCH_CHECK(x.dim() >= 1, "x must have at least one dimension, got ", x.sizes());
  const int64_t columns = x.size(-1);
  const int64_t rows = x.numel() / std::max<int64_t>(columns, 1);
  const Dropout dropout = make_dropout(dropout_p, seed);
  const Tensor mask = at::empty(x.sizes(), x.options().dtype(at::kDouble));
  double* data = mask.mutable_data_ptr<double>();
  at::parallel_for(0, rows, kGrain / std::max<int64_t>(columns, 1) + 1,
                   [&](int64_t begin, int64_t end) {
                     double block[kDropoutBlock];
                     for (int64_t row = begin; row < end; ++row) {
                       for (int64_t first = 0; first < columns; first += kDropoutBlock) {
                         dropout_block(dropout, row, first / kDropoutBlock, block);
                         const int64_t count = std::min<int64_t>(kDropoutBlock, columns - first);
                         std::copy(block, block + count, data + row * columns + first);
                       }
                     }
                   });
  return mask.to(x.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(gauge_ext, CPU, m) {
  m.impl("lora_linear", &lora_linear);
  m.impl("lora_linear_forward", &forward);
  m.impl("lora_linear_backward", &backward);
  m.impl("dropout_mask", &dropout_mask);
}

}  // namespace gauge_ext
