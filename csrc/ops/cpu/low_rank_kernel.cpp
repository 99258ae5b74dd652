#include "ops/cpu/low_rank.h"

#include "ops/cpu/panel.h"
#include "ops/cpu/tiles.h"

namespace gauge_ext {
namespace {

template <typename scalar_t, typename acc_t>
void project(const scalar_t* x,
             int64_t first_row,
             int64_t rows,
             int64_t columns,
             const acc_t* right,
             int64_t rank,
             const Dropout& dropout,
             acc_t* hidden) {
  Panel<scalar_t, acc_t> panel(panel_rows<acc_t>(rows, columns), columns, dropout);
  for_each_panel<acc_t>(rows, columns, [&](int64_t row, int64_t count) {
    const acc_t* values = panel.read(x + row * columns, first_row + row, count);
    dot_panel(values, count, columns, right, rank, hidden + row * rank);
  });
}

template <typename scalar_t, typename acc_t>
void expand(scalar_t* y,
            bool add,
            const acc_t* bias,
            int64_t rows,
            int64_t columns,
            const acc_t* left,
            const acc_t* right,
            int64_t rank,
            acc_t scale) {
  expand_panel<scalar_t, acc_t>(y, rows, columns, left, right, rank, {scale, nullptr, bias, add});
}

template <typename scalar_t, typename acc_t>
void project_reduce(const scalar_t* x,
                    int64_t rows,
                    int64_t columns,
                    const acc_t* right,
                    const acc_t* left,
                    int64_t rank,
                    acc_t* hidden,
                    acc_t* sum) {
  const Dropout none;
  Panel<scalar_t, acc_t> panel(panel_rows<acc_t>(rows, columns), columns, none);
  for_each_panel<acc_t>(rows, columns, [&](int64_t row, int64_t count) {
    const acc_t* values = panel.read(x + row * columns, row, count);
    dot_panel(values, count, columns, right, rank, hidden + row * rank);
    reduce_panel(values, count, columns, left + row * rank, rank, sum);
  });
}

template <typename scalar_t, typename acc_t>
void expand_reduce(const scalar_t* x,
                   scalar_t* y,
                   bool add,
                   int64_t first_row,
                   int64_t rows,
                   int64_t columns,
                   const acc_t* left,
                   const acc_t* right,
                   int64_t rank,
                   const Dropout& dropout,
                   acc_t* sum) {
  Panel<scalar_t, acc_t> panel(panel_rows<acc_t>(rows, columns), columns, dropout);
  for_each_panel<acc_t>(rows, columns, [&](int64_t row, int64_t count) {
    const acc_t* l = left + row * rank;
    const acc_t* values = panel.read(x + row * columns, first_row + row, count);
    reduce_panel(values, count, columns, l, rank, sum);
    if (y != nullptr) {
      expand_panel<scalar_t, acc_t>(y + row * columns, count, columns, l, right, rank,
                                    {acc_t(1), panel.mask(), nullptr, add});
    }
  });
}

template <typename scalar_t>
constexpr LowRankKernels<scalar_t> table() {
  using acc_t = typename AccOf<scalar_t>::type;
  return {&project<scalar_t, acc_t>, &expand<scalar_t, acc_t>, &project_reduce<scalar_t, acc_t>,
          &expand_reduce<scalar_t, acc_t>, &draw_rows<acc_t>};
}

}  // namespace

namespace CPU_CAPABILITY {

extern const LowRankKernels<float> low_rank_float;
extern const LowRankKernels<double> low_rank_double;
extern const LowRankKernels<BFloat16Bits> low_rank_bfloat16;

const LowRankKernels<float> low_rank_float = table<float>();
const LowRankKernels<double> low_rank_double = table<double>();
const LowRankKernels<BFloat16Bits> low_rank_bfloat16 = table<BFloat16Bits>();

}  // namespace CPU_CAPABILITY
}  // namespace gauge_ext
