#include "ops/cpu/scale.h"

#include "ops/cpu/vec.h"

namespace gauge_ext {
namespace {

template <typename scalar_t>
void scale(const scalar_t* y,
           int64_t rows,
           int64_t columns,
           const typename AccOf<scalar_t>::type* gain,
           const typename AccOf<scalar_t>::type* bias,
           scalar_t* z) {
  using acc_t = typename AccOf<scalar_t>::type;
  constexpr int64_t kStep = kWidth<acc_t>;
  for (int64_t row = 0; row < rows; ++row, y += columns, z += columns) {
    int64_t j = 0;
    for (; j + kStep <= columns; j += kStep) {
      const Vec<acc_t> value = load_as<scalar_t, acc_t>(y + j);
      store_as<scalar_t, acc_t>(z + j, value * load<acc_t>(gain + j) + load<acc_t>(bias + j));
    }
    for (; j < columns; ++j) {
      z[j] = from_acc<scalar_t, acc_t>(to_acc(y[j]) * gain[j] + bias[j]);
    }
  }
}

// The sums stay in the first-level cache, where the rows go by once.
template <bool WITH_GRAD, bool WITH_SUM, typename scalar_t>
void backward_rows(const scalar_t* grad,
                   const scalar_t* y,
                   int64_t rows,
                   int64_t columns,
                   const typename AccOf<scalar_t>::type* gain,
                   scalar_t* grad_y,
                   typename AccOf<scalar_t>::type* sum) {
  using acc_t = typename AccOf<scalar_t>::type;
  constexpr int64_t kStep = kWidth<acc_t>;
  for (int64_t row = 0; row < rows; ++row) {
    const scalar_t* g = grad + row * columns;
    int64_t j = 0;
    for (; j + kStep <= columns; j += kStep) {
      const Vec<acc_t> value = load_as<scalar_t, acc_t>(g + j);
      if constexpr (WITH_GRAD) {
        store_as<scalar_t, acc_t>(grad_y + row * columns + j, value * load<acc_t>(gain + j));
      }
      if constexpr (WITH_SUM) {
        const Vec<acc_t> other = load_as<scalar_t, acc_t>(y + row * columns + j);
        store<acc_t>(sum + j, value * other + load<acc_t>(sum + j));
      }
    }
    for (; j < columns; ++j) {
      const acc_t value = to_acc(g[j]);
      if constexpr (WITH_GRAD) {
        grad_y[row * columns + j] = from_acc<scalar_t, acc_t>(value * gain[j]);
      }
      if constexpr (WITH_SUM) {
        sum[j] += value * to_acc(y[row * columns + j]);
      }
    }
  }
}

template <typename scalar_t>
void scale_backward(const scalar_t* grad,
                    const scalar_t* y,
                    int64_t rows,
                    int64_t columns,
                    const typename AccOf<scalar_t>::type* gain,
                    scalar_t* grad_y,
                    typename AccOf<scalar_t>::type* sum) {
  if (grad_y == nullptr) {
    backward_rows<false, true>(grad, y, rows, columns, gain, grad_y, sum);
  } else if (sum == nullptr) {
    backward_rows<true, false>(grad, y, rows, columns, gain, grad_y, sum);
  } else {
    backward_rows<true, true>(grad, y, rows, columns, gain, grad_y, sum);
  }
}

template <typename scalar_t>
constexpr ScaleKernels<scalar_t> table() {
  return {&scale<scalar_t>, &scale_backward<scalar_t>};
}

}  // namespace

namespace CPU_CAPABILITY {
extern const ScaleKernels<float> scale_float;
extern const ScaleKernels<double> scale_double;
extern const ScaleKernels<BFloat16Bits> scale_bfloat16;
const ScaleKernels<float> scale_float = table<float>();
const ScaleKernels<double> scale_double = table<double>();
const ScaleKernels<BFloat16Bits> scale_bfloat16 = table<BFloat16Bits>();
}  // namespace CPU_CAPABILITY

}  // namespace gauge_ext
