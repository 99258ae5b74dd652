#include "ops/cpu/adapted_layer.h"

#include <algorithm>

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include "ops/cpu/paths.h"

namespace gauge_ext {
namespace {

// A converted part of a weight has so many elements at most: it is written, and read once or twice.
constexpr int64_t kConvertedElements = int64_t(1) << 22;
// With few rows it is the weight that takes the time, so a part should stay in the cache of the
// thread that wrote it; with many, x would be read and packed once for each part.
constexpr int64_t kFewRows = 64;
constexpr int64_t kCachedElements = int64_t(1) << 17;

// Contiguous, or the transpose of what is.
at::Tensor with_unit_stride(const at::Tensor& weight) {
  const bool by_rows = weight.stride(1) == 1 && weight.stride(0) >= weight.size(1);
  const bool by_columns = weight.stride(0) == 1 && weight.stride(1) >= weight.size(0);
  return by_rows || by_columns ? weight : weight.contiguous();
}

// A tensor in acc_t: its own memory where it has that dtype, else a copy in `copy`.
template <typename acc_t>
const acc_t* widened(const at::Tensor& tensor, Buffer<acc_t>& copy) {
  constexpr auto dtype = acc_dtype<acc_t>();
  if (tensor.scalar_type() == dtype) {
    return data_of<acc_t>(tensor);
  }
  copy = Buffer<acc_t>(tensor.numel());
  at::from_blob(copy.data(), tensor.sizes(), dtype).copy_(tensor);
  return copy.data();
}

// Adds the parts of other pieces, one after the other in memory, to that of the first.
template <typename acc_t>
void add_pieces(acc_t* first, const acc_t* others, int64_t pieces, int64_t count) {
  for (int64_t piece = 1; piece < pieces; ++piece, others += count) {
    for (int64_t i = 0; i < count; ++i) {
      first[i] += others[i];
    }
  }
}

}  // namespace

template <typename scalar_t>
AdaptedLayer<scalar_t>::AdaptedLayer(const LoraLinearSizes& sizes,
                                     const at::Tensor& weight,
                                     const std::optional<at::Tensor>& bias,
                                     const at::Tensor& lora_A,
                                     const at::Tensor& lora_B,
                                     double scaling,
                                     const Dropout& dropout)
    : n_(sizes),
      weight_(with_unit_stride(weight)),
      A_(lora_A.contiguous()),
      B_(lora_B.contiguous()),
      weight_rows_(weight_.stride(0)),
      weight_columns_(weight_.stride(1)),
      scaling_(static_cast<acc_t>(scaling)),
      dropout_(dropout),
      right_(n_.rank * n_.out_features) {
  a_ = widened(A_, wide_A_);
  bias_data_ = nullptr;
  if (bias.has_value()) {
    bias_ = bias->contiguous();
    bias_data_ = widened(bias_, wide_bias_);
  }
  Buffer<acc_t> wide_B;
  low_rank_kernels<acc_t>().transpose(widened(B_, wide_B), n_.out_features, n_.rank, scaling_,
                                      right_.data());
}

template <typename scalar_t>
template <typename F>
void AdaptedLayer<scalar_t>::for_weight(bool merged, const F& body) {
  const scalar_t* weight = data_of<scalar_t>(weight_);
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    if (!merged) {
      body(int64_t(0), n_.out_features, Strided<acc_t>{weight, weight_rows_, weight_columns_});
      return;
    }
  }
  const int64_t in = n_.in_features, out = n_.out_features;
  const int64_t most =
      n_.rows <= kFewRows ? kCachedElements * at::get_num_threads() : kConvertedElements;
  const int64_t step = std::clamp<int64_t>(most / std::max<int64_t>(in, 1), 1, out);
  if (converted_.data() == nullptr) {
    converted_ = Buffer<acc_t>(step * in);
  }
  // Rows are what the kernels read; a transposed weight is turned first.
  const bool turned = weight_columns_ != 1;
  const at::Tensor rows_first = turned ? weight_.contiguous() : weight_;
  const int64_t stride = turned ? in : weight_rows_;
  weight = data_of<scalar_t>(rows_first);
  Buffer<acc_t> wide_B;
  const acc_t* left = merged ? widened(B_, wide_B) : nullptr;
  const auto& kernels = low_rank_kernels<scalar_t>();
  acc_t* to = converted_.data();
  for (int64_t first = 0; first < out; first += step) {
    const int64_t count = std::min(step, out - first);
    // A whole weight stays converted for the next rows.
    if (converted_rows_ != out || converted_merged_ != merged) {
      Pieces(count, in * (merged ? n_.rank : 1)).run([&](int64_t, int64_t row, int64_t rows) {
        const scalar_t* from = weight + (first + row) * stride;
        if (merged) {
          kernels.merge(from, stride, rows, in, left + (first + row) * n_.rank, a_, n_.rank,
                        scaling_, to + row * in);
        } else {
          for (int64_t i = 0; i < rows; ++i) {
            kernels.widen(from + i * stride, in, to + (row + i) * in);
          }
        }
      });
      converted_rows_ = count;
      converted_merged_ = merged;
    }
    body(first, count, Strided<acc_t>{to, in, 1});
  }
}

template <typename scalar_t>
void AdaptedLayer<scalar_t>::forward(const acc_t* x,
                                     int64_t first_row,
                                     int64_t rows,
                                     acc_t* hidden,
                                     acc_t* y) {
  const int64_t in = n_.in_features, out = n_.out_features, rank = n_.rank;
  constexpr bool kHalf = !std::is_same_v<scalar_t, acc_t>;
  const auto& kernels = low_rank_kernels<acc_t>();
  const bool native = kHalf && native_bfloat16();
  const bool small = !native && weight_columns_ == 1 && small_product(n_.rows, in, kHalf);
  const bool merged = !native && !small && !dropout_.active() &&
                      merged_forward(n_.rows, in, out, hidden != nullptr);
  if (native) {
    Buffer<scalar_t> narrow(rows * in);
    low_rank_kernels<scalar_t>().narrow(x, rows * in, narrow.data());
    const auto options = weight_.options();
    const at::Tensor product =
        at::linear(at::from_blob(narrow.data(), {rows, in}, options), weight_,
                   bias_.defined() ? std::optional<at::Tensor>(bias_) : std::nullopt)
            .contiguous();
    low_rank_kernels<scalar_t>().widen(data_of<scalar_t>(product), rows * out, y);
  }
  Buffer<acc_t> unwanted;
  if (hidden == nullptr && !merged) {
    unwanted = Buffer<acc_t>(rows * rank);
    hidden = unwanted.data();
  }
  const bool starts = !merged || small || bias_data_ != nullptr;
  Pieces(rows, (in + out) * rank).run([&](int64_t, int64_t first, int64_t count) {
    acc_t* h = hidden == nullptr ? nullptr : hidden + first * rank;
    if (h != nullptr) {
      kernels.project(x + first * in, first_row + first, count, in, a_, rank, dropout_, h);
    }
    if (starts) {
      kernels.expand(y + first * out, native, bias_data_, count, out, h, right_.data(),
                     merged ? 0 : rank, acc_t(1));
    }
  });
  if (small) {
    const scalar_t* weight = data_of<scalar_t>(weight_);
    Pieces(out, rows * in).run([&](int64_t, int64_t first, int64_t count) {
      low_rank_kernels<scalar_t>().skinny(x, rows, in, weight + first * weight_rows_, weight_rows_,
                                          count, y + first, out);
    });
  } else if (!native) {
    for_weight(merged, [&](int64_t first, int64_t count, const Strided<acc_t>& part) {
      gemm<acc_t>(rows, count, in, x, in, part.transposed(), starts, y + first, out);
    });
  }
}

template <typename scalar_t>
bool AdaptedLayer<scalar_t>::merges_backward() const {
  return !dropout_.active() && (std::is_same_v<scalar_t, acc_t> || !native_bfloat16()) &&
         merged_backward(n_.rows, n_.in_features, n_.out_features);
}

template <typename scalar_t>
auto AdaptedLayer<scalar_t>::sums(int64_t rows, bool needs_x, bool needs_A, bool needs_B) const
    -> Sums {
  Sums sums;
  const int64_t in = n_.in_features, out = n_.out_features, rank = n_.rank;
  sums.pieces = std::max<int64_t>(Pieces(rows, (in + out) * rank).count, 1);
  const auto zeros = [&](int64_t pieces, int64_t columns) {
    Buffer<acc_t> buffer(pieces * rank * columns);
    std::fill_n(buffer.data(), pieces * rank * columns, acc_t(0));
    return buffer;
  };
  if (needs_A || (needs_x && !merges_backward())) {
    sums.A = at::zeros({rank, in}, A_.options().dtype(acc_dtype<acc_t>()));
    sums.rest_A = zeros(sums.pieces - 1, in);
  }
  if (needs_B) {
    sums.B = zeros(sums.pieces, out);
  }
  return sums;
}

template <typename scalar_t>
void AdaptedLayer<scalar_t>::backward(const acc_t* grad,
                                      const acc_t* x,
                                      int64_t first_row,
                                      int64_t rows,
                                      const acc_t* hidden,
                                      const Sums& sums,
                                      acc_t* grad_x,
                                      bool add) {
  const int64_t in = n_.in_features, out = n_.out_features, rank = n_.rank;
  constexpr bool kHalf = !std::is_same_v<scalar_t, acc_t>;
  const auto& kernels = low_rank_kernels<acc_t>();
  const bool native = kHalf && native_bfloat16();
  const bool merged = merges_backward();
  const auto sum_A = [&](int64_t piece) {
    return piece == 0 ? mutable_data_of<acc_t>(sums.A)
                      : sums.rest_A.data() + (piece - 1) * rank * in;
  };
  acc_t* const sum_B = sums.B.data();
  if (native && grad_x != nullptr) {
    Buffer<scalar_t> narrow(rows * out);
    low_rank_kernels<scalar_t>().narrow(grad, rows * out, narrow.data());
    const at::Tensor product =
        at::mm(at::from_blob(narrow.data(), {rows, out}, weight_.options()), weight_).contiguous();
    Buffer<acc_t> wide(add ? rows * in : 0);
    acc_t* to = add ? wide.data() : grad_x;
    low_rank_kernels<scalar_t>().widen(data_of<scalar_t>(product), rows * in, to);
    for (int64_t i = 0; add && i < rows * in; ++i) {
      grad_x[i] += to[i];
    }
    add = true;
  }
  const Buffer<acc_t> grad_hidden(rows * rank);
  Pieces(rows, (in + out) * rank).run([&](int64_t piece, int64_t first, int64_t count) {
    const acc_t* g = grad + first * out;
    acc_t* gh = grad_hidden.data() + first * rank;
    if (sum_B != nullptr) {
      kernels.project_reduce(g, count, out, right_.data(), hidden + first * rank, rank, gh,
                             sum_B + piece * rank * out);
    } else if (sums.A.defined()) {
      kernels.project(g, first, count, out, right_.data(), rank, Dropout(), gh);
    }
    if (sums.A.defined()) {
      acc_t* to = grad_x == nullptr || merged ? nullptr : grad_x + first * in;
      kernels.expand_reduce(x + first * in, to, add, first_row + first, count, in, gh, a_, rank,
                            dropout_, sum_A(piece));
    }
  });
  if (grad_x != nullptr && !native) {
    bool onto = add || !merged;
    for_weight(merged, [&](int64_t first, int64_t count, const Strided<acc_t>& part) {
      gemm<acc_t>(rows, in, count, grad + first, out, part, onto, grad_x, in);
      onto = true;
    });
  }
}

template <typename scalar_t>
at::Tensor AdaptedLayer<scalar_t>::grad_A(const Sums& sums) const {
  add_pieces(mutable_data_of<acc_t>(sums.A), sums.rest_A.data(), sums.pieces,
             n_.rank * n_.in_features);
  return sums.A.to(A_.scalar_type());
}

template <typename scalar_t>
at::Tensor AdaptedLayer<scalar_t>::grad_B(const Sums& sums) const {
  const int64_t count = n_.rank * n_.out_features;
  acc_t* sum = sums.B.data();
  add_pieces(sum, sum + count, sums.pieces, count);
  const at::Tensor grad = at::empty(B_.sizes(), B_.options().dtype(acc_dtype<acc_t>()));
  low_rank_kernels<acc_t>().transpose(sum, n_.rank, n_.out_features, scaling_,
                                      mutable_data_of<acc_t>(grad));
  return grad.to(B_.scalar_type());
}

template class AdaptedLayer<float>;
template class AdaptedLayer<double>;
template class AdaptedLayer<BFloat16Bits>;

}  // namespace gauge_ext
