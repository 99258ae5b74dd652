#include "ops/cpu/factor_step.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "ops/cpu/panel.h"
#include "ops/cpu/small_matrix.h"
#include "ops/cpu/triangle.h"

namespace gauge_ext {
namespace {

// A piece of a factor that stays in the first-level cache with what is computed from it.
constexpr int64_t kPieceBytes = 16 * 1024;

// Rows of B, or columns of A, of one piece: a multiple of two vectors.
template <typename acc_t>
int64_t piece_size(int64_t rank) {
  constexpr int64_t kUnit = 2 * kWidth<acc_t>;
  const int64_t fitting = kPieceBytes / (std::max<int64_t>(rank, 1) * sizeof(acc_t));
  return std::clamp<int64_t>(fitting / kUnit * kUnit, 2 * kUnit, 512);
}

// Calls body(first, count) for the pieces of `total`.
template <typename F>
void for_each_piece(int64_t total, int64_t size, const F& body) {
  for (int64_t first = 0; first < total; first += size) {
    body(first, std::min(size, total - first));
  }
}

int64_t gram_stride(int64_t rank) {
  return (padded<double>(rank) + 3) / 4 * 4;
}

// E in acc_t with padded rows, and its transpose.
template <typename acc_t>
struct Factor {
  acc_t* plain;       // upper triangular
  acc_t* transposed;  // lower triangular
  int64_t stride;

  static int64_t size(int64_t rank) { return 2 * rank * padded<acc_t>(rank); }

  Factor(const double* e, int64_t rank, acc_t* memory)
      : plain(memory),
        transposed(memory + rank * padded<acc_t>(rank)),
        stride(padded<acc_t>(rank)) {
    for (int64_t i = 0; i < rank; ++i) {
      for (int64_t j = 0; j < stride; ++j) {
        plain[i * stride + j] = j < rank ? static_cast<acc_t>(e[i * rank + j]) : acc_t(0);
        transposed[i * stride + j] = j < rank ? static_cast<acc_t>(e[j * rank + i]) : acc_t(0);
      }
    }
  }
};

// --- The metric ---------------------------------------------------------------------------------

// Adds the Gram matrix of rows that come in pieces, each multiplied with E first if there is one.
class GramSum {
 public:
  GramSum(int64_t rank, const double* e, double* sum)
      : rank_(rank), stride_(gram_stride(rank)), sum_(sum) {
    static thread_local Scratch<double> scratch;
    piece_ = piece_size<double>(rank);
    const int64_t values = piece_ * stride_;
    double* memory = scratch.reserve(2 * values + (e != nullptr ? rank * stride_ : 0));
    rows_ = memory;
    moved_ = memory + values;
    if (e != nullptr) {
      factor_ = moved_ + values;
      for (int64_t i = 0; i < rank; ++i) {
        for (int64_t j = 0; j < stride_; ++j) {
          factor_[i * stride_ + j] = j < rank ? e[i * rank + j] : 0.0;
        }
      }
    }
  }

  // Rows of (count, rank), contiguous
  template <typename scalar_t>
  void add_rows(const scalar_t* x, int64_t count, double scale) {
    for_each_piece(count, piece_, [&](int64_t first, int64_t rows) {
      for (int64_t i = 0; i < rows; ++i) {
        const scalar_t* from = x + (first + i) * rank_;
        double* to = rows_ + i * stride_;
        for (int64_t k = 0; k < rank_; ++k) {
          to[k] = scale * to_acc(from[k]);
        }
        clear_padding(to);
      }
      add(rows);
    });
  }

  // Columns of (rank, count), contiguous
  template <typename scalar_t>
  void add_columns(const scalar_t* x, int64_t count) {
    for_each_piece(count, piece_, [&](int64_t first, int64_t columns) {
      int64_t k = 0;
      for (; k + 4 <= rank_; k += 4) {  // four at once: a column's entries lie far apart
        const scalar_t* from = x + k * count + first;
        for (int64_t i = 0; i < columns; ++i) {
          double* to = rows_ + i * stride_ + k;
          to[0] = to_acc(from[i]);
          to[1] = to_acc(from[count + i]);
          to[2] = to_acc(from[2 * count + i]);
          to[3] = to_acc(from[3 * count + i]);
        }
      }
      for (; k < rank_; ++k) {
        const scalar_t* from = x + k * count + first;
        for (int64_t i = 0; i < columns; ++i) {
          rows_[i * stride_ + k] = to_acc(from[i]);
        }
      }
      for (int64_t i = 0; i < columns; ++i) {
        clear_padding(rows_ + i * stride_);
      }
      add(columns);
    });
  }

 private:
  void clear_padding(double* row) const {
    for (int64_t k = rank_; k < stride_; ++k) {
      row[k] = 0;
    }
  }

  void add(int64_t rows) {
    const double* x = rows_;
    if (factor_ != nullptr) {
      right_product(rows_, stride_, rows, factor_, rank_, stride_, Triangle::kUpper, moved_);
      x = moved_;
    }
    add_gram(x, rows, rank_, stride_, sum_);
  }

  int64_t rank_;
  int64_t stride_;
  int64_t piece_;
  double* sum_;
  double* rows_;
  double* moved_;
  double* factor_ = nullptr;
};

void set_zero(double* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    values[i] = 0;
  }
}

// E with Eᵀ S E = I, where collect(E, S) adds to S the Gram matrix of the rows times E. Factors in
// float64 are orthogonalized a second time (CholeskyQR2), as their Gram matrix has the square of
// their condition; in float32 the rounding of the factors themselves is coarser than that.
template <bool TWICE, typename F>
bool inverse_factor(int64_t rank, double* gram, double* e, double* work, const F& collect) {
  const int64_t size = rank * rank;
  bool full = cholesky_upper(gram, rank);
  invert_upper(gram, rank, e);
  if constexpr (TWICE) {
    double* second = work;
    double* inverse = work + size;
    set_zero(second, size);
    collect(e, second);
    full = cholesky_upper(second, rank) && full;
    invert_upper(second, rank, inverse);
    multiply_upper(e, inverse, rank, second);
    std::copy(second, second + size, e);
  }
  return full;
}

// E of the anchor, and E of the other factor with the damping, see factor_step.h. Each collects its
// own Gram matrix; `other_collect` is given rows to add as well.
template <bool TWICE, typename F, typename G>
bool whiten_pair(int64_t r,
                 double damping,
                 const F& anchor_collect,
                 const G& other_collect,
                 double* e_anchor,
                 double* e_other) {
  const int64_t size = r * r;
  static thread_local Scratch<double> scratch;
  double* anchor = scratch.reserve(5 * size);
  double* other = anchor + size;
  double* lower = other + size;
  double* work = lower + size;
  set_zero(anchor, 2 * size);
  anchor_collect(nullptr, anchor);
  other_collect(nullptr, other, nullptr);
  const double square = symmetric_dot(anchor, other, r);
  const bool full = inverse_factor<TWICE>(r, anchor, e_anchor, work, anchor_collect);
  double delta = std::max(damping, kPivotTolerance * square);
  if (delta == 0) {
    delta = 1;  // X = 0, and so is the other factor's gradient
  }
  const double root = square_root(delta);
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < r; ++j) {
      lower[i * r + j] = root * e_anchor[j * r + i];
    }
  }
  add_outer_upper(e_anchor, r, delta, other);
  inverse_factor<TWICE>(r, other, e_other, work,
                        [&](const double* e, double* sum) { other_collect(e, sum, lower); });
  double check = 0;  // NaN unless all are finite
  for (int64_t i = 0; i < size; ++i) {
    check += e_anchor[i] * 0 + e_other[i] * 0;
  }
  return full && square == square && check == 0;
}

template <typename scalar_t>
bool whiten(const FactorLayer<scalar_t>& layer, double damping, double* e_a, double* e_m) {
  constexpr bool kTwice = std::is_same_v<scalar_t, double>;
  const int64_t r = layer.rank;
  const auto collect_a = [&](const double* e, double* sum, const double* more = nullptr) {
    GramSum gram(r, e, sum);
    gram.add_columns(layer.lora_A, layer.columns);
    if (more != nullptr) {
      gram.add_rows(more, r, 1.0);
    }
  };
  const auto collect_b = [&](const double* e, double* sum, const double* more = nullptr) {
    GramSum gram(r, e, sum);
    gram.add_rows(layer.lora_B, layer.rows, layer.scaling);
    if (more != nullptr) {
      gram.add_rows(more, r, 1.0);
    }
  };
  return layer.anchor_B ? whiten_pair<kTwice>(r, damping, collect_b, collect_a, e_m, e_a)
                        : whiten_pair<kTwice>(r, damping, collect_a, collect_b, e_a, e_m);
}

// --- The passes over the factors --------------------------------------------------------------

// q ← average · q + gradient · g, and what is to be whitened: q, or g beside it with look-ahead
template <typename scalar_t, typename acc_t>
void blend(const scalar_t* g,
           acc_t* q,
           int64_t count,
           const StepCoefficients<acc_t>& c,
           acc_t* to) {
  if (q == nullptr) {
    for (int64_t i = 0; i < count; ++i) {
      to[i] = c.scale * to_acc(g[i]);
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    q[i] = c.average * q[i] + c.gradient * to_acc(g[i]);
  }
  if (c.look_ahead != acc_t(0)) {
    for (int64_t i = 0; i < count; ++i) {
      to[i] = c.look_ahead * to_acc(g[i]) + c.average * q[i];
    }
  } else {
    std::copy(q, q + count, to);
  }
}

template <StepRule RULE, typename scalar_t, typename acc_t = typename AccOf<scalar_t>::type>
void descend_rows(const FactorLayer<scalar_t>& layer,
                  const Factor<acc_t>& e,
                  const StepCoefficients<acc_t>& c) {
  const int64_t r = layer.rank;
  const int64_t size = piece_size<acc_t>(r);
  static thread_local Scratch<acc_t> scratch;
  acc_t* source = scratch.reserve(size * (r + 2 * e.stride + 1));
  acc_t* whitened = source + size * r;
  acc_t* step = whitened + size * e.stride;
  acc_t* rates = step + size * e.stride;
  for_each_piece(layer.rows, size, [&](int64_t first, int64_t count) {
    const scalar_t* g = layer.grad_B + first * r;
    if constexpr (RULE == StepRule::kGaugeAdam) {
      for (int64_t i = 0; i < count * r; ++i) {
        source[i] = c.scale * to_acc(g[i]);
      }
      right_product(source, r, count, e.plain, r, e.stride, Triangle::kUpper, whitened);
      for (int64_t i = 0; i < count; ++i) {
        acc_t norm = 0;
        for (int64_t j = 0; j < r; ++j) {
          norm += whitened[i * e.stride + j] * whitened[i * e.stride + j];
        }
        rates[i] = c.rate(norm, layer.sq_B + first + i);
      }
    }
    blend(g, layer.avg_B == nullptr ? nullptr : layer.avg_B + first * r, count * r, c, source);
    right_product(source, r, count, e.plain, r, e.stride, Triangle::kUpper, whitened);
    right_product(whitened, e.stride, count, e.transposed, r, e.stride, Triangle::kLower, step);
    for (int64_t i = 0; i < count; ++i) {
      scalar_t* b = layer.lora_B + (first + i) * r;
      const acc_t rate = RULE == StepRule::kGaugeAdam ? rates[i] : c.lr;
      for (int64_t j = 0; j < r; ++j) {
        b[j] = from_acc<scalar_t>(c.keep * to_acc(b[j]) - rate * step[i * e.stride + j]);
      }
    }
  });
}

template <StepRule RULE, typename scalar_t, typename acc_t = typename AccOf<scalar_t>::type>
void descend_columns(const FactorLayer<scalar_t>& layer,
                     const Factor<acc_t>& e,
                     const StepCoefficients<acc_t>& c) {
  constexpr int64_t kUnit = kTriangleVectors * kWidth<acc_t>;
  const int64_t r = layer.rank, n = layer.columns;
  const int64_t size = piece_size<acc_t>(r);
  static thread_local Scratch<acc_t> scratch;
  acc_t* source = scratch.reserve(size * (3 * r + 2));
  acc_t* whitened = source + size * r;
  acc_t* step = whitened + size * r;
  acc_t* rates = step + size * r;
  acc_t* norms = rates + size;
  for_each_piece(n, size, [&](int64_t first, int64_t count) {
    const int64_t width = (count + kUnit - 1) / kUnit * kUnit;
    for (int64_t k = 0; k < r; ++k) {
      for (int64_t i = count; i < width; ++i) {
        source[k * width + i] = 0;
      }
    }
    if constexpr (RULE == StepRule::kGaugeAdam) {
      for (int64_t k = 0; k < r; ++k) {
        const scalar_t* g = layer.grad_A + k * n + first;
        for (int64_t i = 0; i < count; ++i) {
          source[k * width + i] = c.scale * to_acc(g[i]);
        }
      }
      left_product(source, width, e.plain, r, e.stride, Triangle::kUpper, whitened);
      for (int64_t i = 0; i < width; ++i) {
        norms[i] = 0;
      }
      for (int64_t k = 0; k < r; ++k) {
        for (int64_t i = 0; i < width; ++i) {
          norms[i] += whitened[k * width + i] * whitened[k * width + i];
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        rates[i] = c.rate(norms[i], layer.sq_A + first + i);
      }
    }
    for (int64_t k = 0; k < r; ++k) {
      blend(layer.grad_A + k * n + first,
            layer.avg_A == nullptr ? nullptr : layer.avg_A + k * n + first, count, c,
            source + k * width);
    }
    left_product(source, width, e.plain, r, e.stride, Triangle::kUpper, whitened);
    left_product(whitened, width, e.transposed, r, e.stride, Triangle::kLower, step);
    for (int64_t k = 0; k < r; ++k) {
      scalar_t* a = layer.lora_A + k * n + first;
      for (int64_t i = 0; i < count; ++i) {
        const acc_t rate = RULE == StepRule::kGaugeAdam ? rates[i] : c.lr;
        a[i] = from_acc<scalar_t>(c.keep * to_acc(a[i]) - rate * step[k * width + i]);
      }
    }
  });
}

template <StepRule RULE, typename scalar_t>
void descend(const FactorLayer<scalar_t>& layer,
             const double* e_a,
             const double* e_m,
             const FactorStep& step) {
  using acc_t = typename AccOf<scalar_t>::type;
  static thread_local Scratch<acc_t> scratch;
  acc_t* memory = scratch.reserve(2 * Factor<acc_t>::size(layer.rank));
  const Factor<acc_t> of_b(e_a, layer.rank, memory);
  const Factor<acc_t> of_a(e_m, layer.rank, memory + Factor<acc_t>::size(layer.rank));
  const double back = 1.0 / layer.scaling;
  descend_rows<RULE>(layer, of_b, StepCoefficients<acc_t>(step, RULE, layer.rank, back, back));
  descend_columns<RULE>(layer, of_a, StepCoefficients<acc_t>(step, RULE, layer.rank, 1.0, 1.0));
}

template <typename scalar_t>
double gradient_norm(const FactorLayer<scalar_t>& layer, const double* e_a, const double* e_m) {
  const int64_t r = layer.rank;
  static thread_local Scratch<double> scratch;
  double* sum = scratch.reserve(r * r);
  set_zero(sum, r * r);
  GramSum(r, e_a, sum).add_rows(layer.grad_B, layer.rows, 1.0 / layer.scaling);
  GramSum(r, e_m, sum).add_columns(layer.grad_A, layer.columns);
  double trace = 0;
  for (int64_t i = 0; i < r; ++i) {
    trace += sum[i * r + i];
  }
  return trace;
}

template <typename scalar_t>
constexpr FactorStepKernels<scalar_t> table() {
  return {&whiten<scalar_t>, &gradient_norm<scalar_t>, &descend<StepRule::kScaledGd, scalar_t>,
          &descend<StepRule::kGaugeAdam, scalar_t>};
}

}  // namespace

namespace CPU_CAPABILITY {

extern const FactorStepKernels<float> factor_step_float;
extern const FactorStepKernels<double> factor_step_double;
extern const FactorStepKernels<BFloat16Bits> factor_step_bfloat16;

const FactorStepKernels<float> factor_step_float = table<float>();
const FactorStepKernels<double> factor_step_double = table<double>();
const FactorStepKernels<BFloat16Bits> factor_step_bfloat16 = table<BFloat16Bits>();

}  // namespace CPU_CAPABILITY
}  // namespace gauge_ext
