#include "ops/lora_linear.h"

#include <algorithm>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
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

// What every pass over rows reads: the factors as (r, columns) in acc_t.
struct Factors {
  Tensor A;  // (r, in)
  Tensor B;  // (r, out)

  Factors(const Tensor& lora_A, const Tensor& lora_B, at::ScalarType dtype)
      : A(lora_A.to(dtype).contiguous()), B(lora_B.to(dtype).t().contiguous()) {}
};

template <typename scalar_t>
const scalar_t* data_of(const Tensor& tensor) {
  return static_cast<const scalar_t*>(tensor.const_data_ptr());
}

template <typename scalar_t>
scalar_t* mutable_data_of(const Tensor& tensor) {
  return static_cast<scalar_t*>(tensor.mutable_data_ptr());
}

// In half precision the low-rank part is added to the finished product, in float32, and rounded
// with it. In float32 and float64 it is written first, with the bias, and the product added onto it
// by the matrix multiplication: one pass over (N, out) less.
template <typename scalar_t>
constexpr bool kExpandFirst = std::is_same_v<scalar_t, typename AccOf<scalar_t>::type>;

// x: (N, in), contiguous. Returns y: (N, out) and hidden = (x ∘ M) Aᵀ: (N, r).
template <typename scalar_t>
std::tuple<Tensor, Tensor> forward_rows(const LoraLinearSizes& n,
                                        const Tensor& x,
                                        const Tensor& weight,
                                        const OptionalTensor& bias,
                                        const Factors& factors,
                                        double scaling,
                                        const Dropout& dropout) {
  using acc_t = typename AccOf<scalar_t>::type;
  const auto& kernels = low_rank_kernels<scalar_t>();
  const Tensor hidden = at::empty({n.rows, n.rank}, factors.A.options());
  const Tensor y = kExpandFirst<scalar_t> ? at::empty({n.rows, n.out_features}, x.options())
                                          : at::linear(x, weight, bias).contiguous();
  const acc_t* bias_data = nullptr;
  Tensor dense_bias;
  if constexpr (kExpandFirst<scalar_t>) {
    if (bias.has_value()) {
      dense_bias = bias->contiguous();
      bias_data = data_of<acc_t>(dense_bias);
    }
  }
  const scalar_t* x_data = data_of<scalar_t>(x);
  scalar_t* y_data = mutable_data_of<scalar_t>(y);
  const acc_t* A = data_of<acc_t>(factors.A);
  const acc_t* B = data_of<acc_t>(factors.B);
  acc_t* hidden_data = mutable_data_of<acc_t>(hidden);
  Pieces(n.rows, (n.in_features + n.out_features) * n.rank)
      .run([&](int64_t, int64_t first, int64_t count) {
        acc_t* h = hidden_data + first * n.rank;
        kernels.project(x_data + first * n.in_features, first, count, n.in_features, A, n.rank,
                        dropout, h);
        kernels.expand(y_data + first * n.out_features, !kExpandFirst<scalar_t>, bias_data, count,
                       n.out_features, h, B, n.rank, static_cast<acc_t>(scaling));
      });
  if constexpr (kExpandFirst<scalar_t>) {
    y.addmm_(x, weight.t());
  }
  return {y, hidden};
}

std::tuple<Tensor, Tensor> forward(const Tensor& x,
                                   const Tensor& weight,
                                   const OptionalTensor& bias,
                                   const Tensor& lora_A,
                                   const Tensor& lora_B,
                                   double scaling,
                                   double dropout_p,
                                   const OptionalTensor& seed) {
  const auto n = check_lora_linear(x, weight, bias, lora_A, lora_B, dropout_p, seed);
  const Dropout dropout = make_dropout(dropout_p, seed);
  const Tensor rows = x.contiguous().view({n.rows, n.in_features});
  auto [y, hidden] = dispatch_dtype(x, [&](auto tag) {
    using scalar_t = decltype(tag);
    const Factors factors(lora_A, lora_B, acc_dtype<scalar_t>());
    return forward_rows<scalar_t>(n, rows, weight, bias, factors, scaling, dropout);
  });
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = n.out_features;
  return {y.view(shape), hidden};
}

// One pass over grad, (N, out): returns grad_hidden = s·grad B, (N, r), and grad_B = s·gradᵀ
// hidden, (out, r), which has no elements where it is not wanted.
template <typename scalar_t>
std::tuple<Tensor, Tensor> backward_output(const LoraLinearSizes& n,
                                           const Tensor& grad,
                                           const Factors& factors,
                                           const Tensor& hidden,
                                           double scaling,
                                           bool needs_B) {
  using acc_t = typename AccOf<scalar_t>::type;
  const auto& kernels = low_rank_kernels<scalar_t>();
  const auto options = factors.B.options();
  const Pieces pieces(n.rows, n.out_features * n.rank);
  const Tensor grad_hidden = at::empty({n.rows, n.rank}, options);
  const Tensor sums = at::zeros({needs_B ? pieces.count : 0, n.rank, n.out_features}, options);
  const scalar_t* grad_data = data_of<scalar_t>(grad);
  const acc_t* B = data_of<acc_t>(factors.B);
  const acc_t* hidden_data = data_of<acc_t>(hidden);
  acc_t* grad_hidden_data = mutable_data_of<acc_t>(grad_hidden);
  acc_t* sums_data = mutable_data_of<acc_t>(sums);
  pieces.run([&](int64_t piece, int64_t first, int64_t count) {
    const scalar_t* g = grad_data + first * n.out_features;
    acc_t* gh = grad_hidden_data + first * n.rank;
    if (needs_B) {
      kernels.project_reduce(g, count, n.out_features, B, hidden_data + first * n.rank, n.rank, gh,
                             sums_data + piece * n.rank * n.out_features);
    } else {
      kernels.project(g, first, count, n.out_features, B, n.rank, Dropout(), gh);
    }
    for (int64_t i = 0; i < count * n.rank; ++i) {
      gh[i] *= static_cast<acc_t>(scaling);
    }
  });
  return {grad_hidden,
          needs_B ? sums.sum(0).mul_(scaling).t().contiguous() : at::empty({0}, options)};
}

// One pass over x and grad_x, (N, in): grad_x = grad W + (grad_hidden A) ∘ M, and
// grad_A = grad_hiddenᵀ (x ∘ M), (r, in); either has no elements where it is not wanted.
template <typename scalar_t>
std::tuple<Tensor, Tensor> backward_input(const LoraLinearSizes& n,
                                          const Tensor& grad,
                                          const Tensor& x,
                                          const Tensor& weight,
                                          const Factors& factors,
                                          const Tensor& grad_hidden,
                                          const Dropout& dropout,
                                          bool needs_x,
                                          bool needs_A) {
  using acc_t = typename AccOf<scalar_t>::type;
  const auto& kernels = low_rank_kernels<scalar_t>();
  const auto options = factors.A.options();
  const Tensor grad_x = !needs_x                 ? at::empty({0}, x.options())
                        : kExpandFirst<scalar_t> ? at::empty({n.rows, n.in_features}, x.options())
                                                 : at::mm(grad, weight);
  const Pieces pieces(n.rows, n.in_features * n.rank);
  const Tensor sums = at::zeros({pieces.count, n.rank, n.in_features}, options);
  const scalar_t* x_data = data_of<scalar_t>(x);
  scalar_t* grad_x_data = needs_x ? mutable_data_of<scalar_t>(grad_x) : nullptr;
  const acc_t* A = data_of<acc_t>(factors.A);
  const acc_t* grad_hidden_data = data_of<acc_t>(grad_hidden);
  acc_t* sums_data = mutable_data_of<acc_t>(sums);
  pieces.run([&](int64_t piece, int64_t first, int64_t count) {
    kernels.expand_reduce(
        x_data + first * n.in_features, needs_x ? grad_x_data + first * n.in_features : nullptr,
        !kExpandFirst<scalar_t>, first, count, n.in_features, grad_hidden_data + first * n.rank, A,
        n.rank, dropout, sums_data + piece * n.rank * n.in_features);
  });
  if constexpr (kExpandFirst<scalar_t>) {
    if (needs_x) {
      grad_x.addmm_(grad, weight);
    }
  }
  return {grad_x, needs_A ? sums.sum(0) : at::empty({0}, options)};
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
  const auto n = check_lora_linear(x, weight, std::nullopt, lora_A, lora_B, dropout_p, seed);
  TORCH_CHECK(grad.dim() == x.dim() && grad.size(-1) == n.out_features &&
                  grad.numel() == n.rows * n.out_features,
              "grad must have shape [*batch, out] = [*, ", n.out_features, "] to fit x ", x.sizes(),
              ", got ", grad.sizes());
  const Dropout dropout = make_dropout(dropout_p, seed);
  const Tensor grad_rows = grad.contiguous().view({n.rows, n.out_features});
  const Tensor rows = x.contiguous().view({n.rows, n.in_features});
  return dispatch_dtype(x, [&](auto tag) -> std::tuple<Tensor, Tensor, Tensor> {
    using scalar_t = decltype(tag);
    const Factors factors(lora_A, lora_B, acc_dtype<scalar_t>());
    const Tensor left = hidden.to(acc_dtype<scalar_t>()).contiguous();
    auto [grad_hidden, grad_B] =
        backward_output<scalar_t>(n, grad_rows, factors, left, scaling, needs_B);
    Tensor grad_x = at::empty({0}, x.options()), grad_A = at::empty({0}, lora_A.options());
    if (needs_x || needs_A) {
      std::tie(grad_x, grad_A) = backward_input<scalar_t>(n, grad_rows, rows, weight, factors,
                                                          grad_hidden, dropout, needs_x, needs_A);
    }
    return {needs_x ? grad_x.view(x.sizes()) : grad_x, grad_A.to(lora_A.scalar_type()),
            grad_B.to(lora_B.scalar_type())};
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
  const auto& kernels = low_rank_kernels<double>();
  Pieces(rows, columns).run([&](int64_t, int64_t first, int64_t count) {
    if (dropout.active()) {
      kernels.mask(dropout, first, count, columns, data + first * columns);
    } else {
      std::fill(data + first * columns, data + (first + count) * columns, 1.0);
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
