#include "ops/cpu/factor_step.h"

#include <algorithm>
#include <cstdint>

#include "ops/cpu/factor_gram.h"
#include "ops/cpu/factor_whitening.h"
#include "ops/cpu/triangle.h"

namespace gauge_ext {
namespace {

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
  } else if (c.look_ahead != acc_t(0)) {
    for (int64_t i = 0; i < count; ++i) {
      q[i] = c.average * q[i] + c.gradient * to_acc(g[i]);
      to[i] = c.look_ahead * to_acc(g[i]) + c.average * q[i];
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      to[i] = q[i] = c.average * q[i] + c.gradient * to_acc(g[i]);
    }
  }
}

// x ← keep · x - step for a vector of which `count` lanes lie in x
template <typename scalar_t, typename acc_t>
inline GAUGE_EXT_INLINE void move(scalar_t* x, int64_t count, acc_t keep, const Vec<acc_t>& step) {
  if (count >= kWidth<acc_t>) {
    store_as<scalar_t, acc_t>(x, keep * load_as<scalar_t, acc_t>(x) - step);
    return;
  }
  for (int64_t lane = 0; lane < count; ++lane) {
    x[lane] = from_acc<scalar_t>(keep * to_acc(x[lane]) - step[lane]);
  }
}

template <StepRule RULE, typename scalar_t, typename acc_t = typename AccOf<scalar_t>::type>
void descend_rows(const FactorLayer<scalar_t>& layer,
                  const Factor<acc_t>& e,
                  const StepCoefficients<acc_t>& c) {
  const int64_t r = layer.rank;
  const int64_t size = piece_size<acc_t>(r);
  static thread_local Scratch<acc_t> scratch;
  acc_t* source = scratch.reserve(size * (r + e.stride + 1 + kWidth<acc_t>));
  acc_t* whitened = source + size * r;
  acc_t* rates = whitened + size * e.stride;
  acc_t* norms = rates + size;  // a vector for each row
  for_each_piece(layer.rows, size, [&](int64_t first, int64_t count) {
    const scalar_t* g = layer.grad_B + first * r;
    if constexpr (RULE == StepRule::kGaugeAdam) {
      for (int64_t i = 0; i < count * r; ++i) {
        source[i] = c.scale * to_acc(g[i]);
      }
      std::fill(norms, norms + count * kWidth<acc_t>, acc_t(0));
      right_product(source, r, count, e.plain, r, e.stride, Triangle::kUpper,
                    [&](int64_t i, int64_t, const Vec<acc_t>& value) GAUGE_EXT_INLINE {
                      acc_t* to = norms + i * kWidth<acc_t>;
                      store<acc_t>(to, load<acc_t>(to) + value * value);
                    });
      for (int64_t i = 0; i < count; ++i) {
        const acc_t norm = horizontal_sum<acc_t>(load<acc_t>(norms + i * kWidth<acc_t>));
        rates[i] = c.rate(norm, layer.sq_B + first + i);
      }
    }
    blend(g, layer.avg_B == nullptr ? nullptr : layer.avg_B + first * r, count * r, c, source);
    right_product(source, r, count, e.plain, r, e.stride, Triangle::kUpper,
                  [&](int64_t i, int64_t j, const Vec<acc_t>& value) GAUGE_EXT_INLINE {
                    prefetch(layer.lora_B + (first + i) * r + j);
                    store<acc_t>(whitened + i * e.stride + j, value);
                  });
    right_product(whitened, e.stride, count, e.transposed, r, e.stride, Triangle::kLower,
                  [&](int64_t i, int64_t j, const Vec<acc_t>& value) GAUGE_EXT_INLINE {
                    prefetch(layer.grad_B + (first + count + i) * r + j);
                    if (layer.avg_B != nullptr) {
                      prefetch(layer.avg_B + (first + count + i) * r + j);
                    }
                    const acc_t rate = RULE == StepRule::kGaugeAdam ? rates[i] : c.lr;
                    move(layer.lora_B + (first + i) * r + j, r - j, c.keep, rate * value);
                  });
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
  acc_t* source = scratch.reserve(size * (2 * r + 1));
  acc_t* whitened = source + size * r;
  acc_t* rates = whitened + size * r;
  for_each_piece(n, size, [&](int64_t first, int64_t count) {
    const int64_t width = (count + kUnit - 1) / kUnit * kUnit;
    for (int64_t k = 0; k < r; ++k) {
      std::fill(source + k * width + count, source + (k + 1) * width, acc_t(0));
    }
    if constexpr (RULE == StepRule::kGaugeAdam) {
      for (int64_t k = 0; k < r; ++k) {
        const scalar_t* g = layer.grad_A + k * n + first;
        for (int64_t i = 0; i < count; ++i) {
          source[k * width + i] = c.scale * to_acc(g[i]);
        }
      }
      std::fill(rates, rates + width, acc_t(0));
      left_product(source, width, e.plain, r, e.stride, Triangle::kUpper,
                   [&](int64_t, int64_t i, const Vec<acc_t>& value) GAUGE_EXT_INLINE {
                     store<acc_t>(rates + i, load<acc_t>(rates + i) + value * value);
                   });
      for (int64_t i = 0; i < count; ++i) {
        rates[i] = c.rate(rates[i], layer.sq_A + first + i);
      }
    }
    for (int64_t k = 0; k < r; ++k) {
      blend(layer.grad_A + k * n + first,
            layer.avg_A == nullptr ? nullptr : layer.avg_A + k * n + first, count, c,
            source + k * width);
    }
    left_product(source, width, e.plain, r, e.stride, Triangle::kUpper,
                 [&](int64_t k, int64_t i, const Vec<acc_t>& value) GAUGE_EXT_INLINE {
                   prefetch(layer.lora_A + k * n + first + i);
                   store<acc_t>(whitened + k * width + i, value);
                 });
    left_product(whitened, width, e.transposed, r, e.stride, Triangle::kLower,
                 [&](int64_t k, int64_t i, const Vec<acc_t>& value) GAUGE_EXT_INLINE {
                   prefetch(layer.grad_A + k * n + first + count + i);
                   if (layer.avg_A != nullptr) {
                     prefetch(layer.avg_A + k * n + first + count + i);
                   }
                   Vec<acc_t> rate = Vec<acc_t>{} + c.lr;
                   if constexpr (RULE == StepRule::kGaugeAdam) {
                     rate = load<acc_t>(rates + i);
                   }
                   move(layer.lora_A + k * n + first + i, count - i, c.keep, rate * value);
                 });
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
