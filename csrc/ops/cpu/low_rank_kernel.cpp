#include "ops/cpu/low_rank.h"

#include "ops/cpu/panel.h"
#include "ops/cpu/skinny.h"
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
  Panel<scalar_t, acc_t> panel(dropout);
  const ConstView<scalar_t> from{x, columns};
  for_each_panel(rows, columns, [&](int64_t row, int64_t count, int64_t column, int64_t width) {
    const auto values = panel.read(from.from(row, column), first_row + row, count, column, width);
    dot_panel<acc_t>(values, count, width, {right + column, columns}, rank, column > 0,
                     hidden + row * rank);
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
  const Expand<acc_t> how{scale, {nullptr, 0}, bias, add};
  expand_panel<scalar_t, acc_t>({y, columns}, rows, columns, left, {right, columns}, rank, how);
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
  Panel<scalar_t, acc_t> panel(none);
  const ConstView<scalar_t> from{x, columns};
  for_each_panel(rows, columns, [&](int64_t row, int64_t count, int64_t column, int64_t width) {
    const auto values = panel.read(from.from(row, column), row, count, column, width);
    dot_panel<acc_t>(values, count, width, {right + column, columns}, rank, column > 0,
                     hidden + row * rank);
    reduce_panel<acc_t>(values, count, width, left + row * rank, rank, {sum + column, columns});
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
  Panel<scalar_t, acc_t, /*KEEPS_MASK=*/true> panel(dropout);
  const ConstView<scalar_t> from{x, columns};
  for_each_panel(rows, columns, [&](int64_t row, int64_t count, int64_t column, int64_t width) {
    const acc_t* l = left + row * rank;
    const auto values = panel.read(from.from(row, column), first_row + row, count, column, width);
    reduce_panel<acc_t>(values, count, width, l, rank, {sum + column, columns});
    if (y != nullptr) {
      const View<scalar_t> to = View<scalar_t>{y, columns}.from(row, column);
      expand_panel<scalar_t, acc_t>(to, count, width, l, {right + column, columns}, rank,
                                    {acc_t(1), panel.mask(), nullptr, add});
    }
  });
}

template <typename scalar_t, typename acc_t>
void widen(const scalar_t* from, int64_t count, acc_t* to) {
  int64_t i = 0;
  for (; i + kWidth<acc_t> <= count; i += kWidth<acc_t>) {
    store<acc_t>(to + i, load_as<scalar_t, acc_t>(from + i));
  }
  for (; i < count; ++i) {
    to[i] = to_acc(from[i]);
  }
}

template <typename scalar_t, typename acc_t>
void narrow(const acc_t* from, int64_t count, scalar_t* to) {
  int64_t i = 0;
  for (; i + kWidth<acc_t> <= count; i += kWidth<acc_t>) {
    store_as<scalar_t, acc_t>(to + i, load<acc_t>(from + i));
  }
  for (; i < count; ++i) {
    to[i] = from_acc<scalar_t>(from[i]);
  }
}

template <typename scalar_t, typename acc_t>
void merge(const scalar_t* weight,
           int64_t stride,
           int64_t rows,
           int64_t columns,
           const acc_t* left,
           const acc_t* right,
           int64_t rank,
           acc_t scale,
           acc_t* merged) {
  const Expand<acc_t> how{scale, {nullptr, 0}, nullptr, true};
  for (int64_t row = 0; row < rows; row += kExpandRows) {
    const int64_t count = std::min<int64_t>(kExpandRows, rows - row);
    acc_t* to = merged + row * columns;
    for (int64_t i = 0; i < count; ++i) {
      widen(weight + (row + i) * stride, columns, to + i * columns);
    }
    expand_panel<acc_t, acc_t>({to, columns}, count, columns, left + row * rank, {right, columns},
                               rank, how);
  }
}

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
// The transpose of 8 x 8 floats: neighbours are interleaved, then pairs, then halves of registers.
inline void transpose_square(const float* from,
                             int64_t stride,
                             float scale,
                             float* to,
                             int64_t gap) {
  __m256 row[8], pairs[8], fours[8];
  for (int i = 0; i < 8; ++i) {
    row[i] = _mm256_mul_ps(_mm256_loadu_ps(from + i * stride), _mm256_set1_ps(scale));
  }
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int k = 0; k < 2; ++k) {
      fours[i + 2 * k] = _mm256_shuffle_ps(pairs[i + k], pairs[i + k + 2], 0x44);
      fours[i + 2 * k + 1] = _mm256_shuffle_ps(pairs[i + k], pairs[i + k + 2], 0xEE);
    }
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * gap, _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * gap, _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31));
  }
}
#endif

template <typename scalar_t, typename acc_t>
void transpose(const scalar_t* x, int64_t rows, int64_t columns, acc_t scale, acc_t* to) {
  constexpr int64_t kSide = 8;
  for (int64_t row = 0; row < rows; row += kSide) {
    for (int64_t column = 0; column < columns; column += kSide) {
      const scalar_t* from = x + row * columns + column;
      acc_t* into = to + column * rows + row;
      if (row + kSide <= rows && column + kSide <= columns) {
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
        if constexpr (std::is_same_v<scalar_t, float>) {
          transpose_square(from, columns, scale, into, rows);
          continue;
        }
#endif
        for (int64_t c = 0; c < kSide; ++c) {
          for (int64_t i = 0; i < kSide; ++i) {
            into[c * rows + i] = scale * to_acc(from[i * columns + c]);
          }
        }
      } else {
        for (int64_t c = 0; c < std::min(kSide, columns - column); ++c) {
          for (int64_t i = 0; i < std::min(kSide, rows - row); ++i) {
            into[c * rows + i] = scale * to_acc(from[i * columns + c]);
          }
        }
      }
    }
  }
}

template <typename scalar_t>
constexpr LowRankKernels<scalar_t> table() {
  using acc_t = typename AccOf<scalar_t>::type;
  return {&project<scalar_t, acc_t>,
          &expand<scalar_t, acc_t>,
          &project_reduce<scalar_t, acc_t>,
          &expand_reduce<scalar_t, acc_t>,
          &draw_rows<acc_t>,
          &merge<scalar_t, acc_t>,
          &skinny_product<scalar_t, acc_t>,
          &transpose<scalar_t, acc_t>,
          &widen<scalar_t, acc_t>,
          &narrow<scalar_t, acc_t>};
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
