#include "ops/cpu/low_rank.h"

#include <algorithm>
#include <memory>

#include "ops/cpu/vec.h"

namespace gauge_ext {
namespace {

// A panel of about this many bytes stays in the second-level cache while it is read twice.
constexpr int64_t kPanelBytes = 96 * 1024;

// Rows (or rank entries) and vectors of a register tile: with a tile of 3 x 4 accumulators and the
// operands, 16 registers are full, and each load feeds more than one multiply-add.
constexpr int kDotRows = kVectorRegisters == 32 ? 4 : 3;
constexpr int kDotRank = 4;
constexpr int kTileRows = 4;
constexpr int kTileVectors = 2;

template <typename acc_t>
int64_t panel_rows(int64_t rows, int64_t columns) {
  const int64_t fitting = kPanelBytes / (std::max<int64_t>(columns, 1) * sizeof(acc_t));
  return std::min(rows, std::clamp<int64_t>(fitting / kTileRows * kTileRows, 12, 96));
}

// ROWS x RANK dot products along the columns: H[i, j] = sum_c X[i, c] R[j, c]
template <int ROWS, int RANK, typename acc_t>
void dot_tile(const acc_t* x, const acc_t* right, int64_t columns, acc_t* hidden, int64_t rank) {
  Vec<acc_t> sum[ROWS][RANK] = {};
  int64_t column = 0;
  for (; column + kWidth<acc_t> <= columns; column += kWidth<acc_t>) {
    Vec<acc_t> r[RANK];
    for (int j = 0; j < RANK; ++j) {
      r[j] = load<acc_t>(right + j * columns + column);
    }
    for (int i = 0; i < ROWS; ++i) {
      const Vec<acc_t> value = load<acc_t>(x + i * columns + column);
      for (int j = 0; j < RANK; ++j) {
        sum[i][j] += value * r[j];
      }
    }
  }
  for (int i = 0; i < ROWS; ++i) {
    for (int j = 0; j < RANK; ++j) {
      acc_t total = horizontal_sum<acc_t>(sum[i][j]);
      for (int64_t c = column; c < columns; ++c) {
        total += x[i * columns + c] * right[j * columns + c];
      }
      hidden[i * rank + j] = total;
    }
  }
}

template <int ROWS, typename acc_t>
void dot_rows(const acc_t* x, const acc_t* right, int64_t columns, acc_t* hidden, int64_t rank) {
  int64_t j = 0;
  for (; j + kDotRank <= rank; j += kDotRank) {
    dot_tile<ROWS, kDotRank>(x, right + j * columns, columns, hidden + j, rank);
  }
  for (; j < rank; ++j) {
    dot_tile<ROWS, 1>(x, right + j * columns, columns, hidden + j, rank);
  }
}

// H = X Rᵀ for a panel in acc_t
template <typename acc_t>
void project_panel(const acc_t* x,
                   int64_t rows,
                   int64_t columns,
                   const acc_t* right,
                   int64_t rank,
                   acc_t* hidden) {
  int64_t i = 0;
  for (; i + kDotRows <= rows; i += kDotRows) {
    dot_rows<kDotRows>(x + i * columns, right, columns, hidden + i * rank, rank);
  }
  for (; i < rows; ++i) {
    dot_rows<1>(x + i * columns, right, columns, hidden + i * rank, rank);
  }
}

// Y[ROWS, VECTORS] += scale · L R (∘ M): the tile is summed over the rank in registers
template <int ROWS, int VECTORS, typename scalar_t, typename acc_t>
void update_tile(scalar_t* y,
                 const acc_t* mask,
                 int64_t columns,
                 const acc_t* left,
                 const acc_t* right,
                 int64_t rank,
                 acc_t scale) {
  Vec<acc_t> sum[ROWS][VECTORS] = {};
  for (int64_t j = 0; j < rank; ++j) {
    Vec<acc_t> r[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      r[v] = load<acc_t>(right + j * columns + v * kWidth<acc_t>);
    }
    for (int i = 0; i < ROWS; ++i) {
      const acc_t l = left[i * rank + j];
      for (int v = 0; v < VECTORS; ++v) {
        sum[i][v] += l * r[v];
      }
    }
  }
  for (int i = 0; i < ROWS; ++i) {
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t at = i * columns + v * kWidth<acc_t>;
      Vec<acc_t> value = sum[i][v] * scale;
      if (mask != nullptr) {
        value *= load<acc_t>(mask + at);
      }
      add_vector(y + at, value);
    }
  }
}

template <int ROWS, typename scalar_t, typename acc_t>
void update_rows(scalar_t* y,
                 const acc_t* mask,
                 int64_t columns,
                 const acc_t* left,
                 const acc_t* right,
                 int64_t rank,
                 acc_t scale) {
  constexpr int64_t kStep = kTileVectors * kWidth<acc_t>;
  const auto masked = [mask](int64_t c) { return mask == nullptr ? nullptr : mask + c; };
  int64_t c = 0;
  for (; c + kStep <= columns; c += kStep) {
    update_tile<ROWS, kTileVectors>(y + c, masked(c), columns, left, right + c, rank, scale);
  }
  for (; c + kWidth<acc_t> <= columns; c += kWidth<acc_t>) {
    update_tile<ROWS, 1>(y + c, masked(c), columns, left, right + c, rank, scale);
  }
  for (; c < columns; ++c) {
    for (int i = 0; i < ROWS; ++i) {
      acc_t value = 0;
      for (int64_t j = 0; j < rank; ++j) {
        value += left[i * rank + j] * right[j * columns + c];
      }
      value *= scale;
      add_to(y + i * columns + c, mask == nullptr ? value : value * mask[i * columns + c]);
    }
  }
}

// Y += scale · L R (∘ M) for a panel; mask is null or the panel's multipliers
template <typename scalar_t, typename acc_t>
void update_panel(scalar_t* y,
                  const acc_t* mask,
                  int64_t rows,
                  int64_t columns,
                  const acc_t* left,
                  const acc_t* right,
                  int64_t rank,
                  acc_t scale) {
  const auto masked = [&](int64_t i) { return mask == nullptr ? nullptr : mask + i * columns; };
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows) {
    update_rows<kTileRows>(y + i * columns, masked(i), columns, left + i * rank, right, rank,
                           scale);
  }
  for (; i < rows; ++i) {
    update_rows<1>(y + i * columns, masked(i), columns, left + i * rank, right, rank, scale);
  }
}

// S[RANK, VECTORS] += Lᵀ X, summed over the panel's rows in registers
template <int RANK, int VECTORS, typename acc_t>
void reduce_tile(const acc_t* x,
                 int64_t rows,
                 int64_t columns,
                 const acc_t* left,
                 int64_t rank,
                 acc_t* sum) {
  Vec<acc_t> s[RANK][VECTORS];
  for (int j = 0; j < RANK; ++j) {
    for (int v = 0; v < VECTORS; ++v) {
      s[j][v] = load<acc_t>(sum + j * columns + v * kWidth<acc_t>);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    Vec<acc_t> value[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      value[v] = load<acc_t>(x + i * columns + v * kWidth<acc_t>);
    }
    for (int j = 0; j < RANK; ++j) {
      const acc_t l = left[i * rank + j];
      for (int v = 0; v < VECTORS; ++v) {
        s[j][v] += l * value[v];
      }
    }
  }
  for (int j = 0; j < RANK; ++j) {
    for (int v = 0; v < VECTORS; ++v) {
      store<acc_t>(sum + j * columns + v * kWidth<acc_t>, s[j][v]);
    }
  }
}

template <int RANK, typename acc_t>
void reduce_rank(const acc_t* x,
                 int64_t rows,
                 int64_t columns,
                 const acc_t* left,
                 int64_t rank,
                 acc_t* sum) {
  constexpr int64_t kStep = kTileVectors * kWidth<acc_t>;
  int64_t c = 0;
  for (; c + kStep <= columns; c += kStep) {
    reduce_tile<RANK, kTileVectors>(x + c, rows, columns, left, rank, sum + c);
  }
  for (; c + kWidth<acc_t> <= columns; c += kWidth<acc_t>) {
    reduce_tile<RANK, 1>(x + c, rows, columns, left, rank, sum + c);
  }
  for (; c < columns; ++c) {
    for (int j = 0; j < RANK; ++j) {
      acc_t total = 0;
      for (int64_t i = 0; i < rows; ++i) {
        total += left[i * rank + j] * x[i * columns + c];
      }
      sum[j * columns + c] += total;
    }
  }
}

// S += Lᵀ X for a panel in acc_t
template <typename acc_t>
void reduce_panel(const acc_t* x,
                  int64_t rows,
                  int64_t columns,
                  const acc_t* left,
                  int64_t rank,
                  acc_t* sum) {
  int64_t j = 0;
  for (; j + kTileRows <= rank; j += kTileRows) {
    reduce_rank<kTileRows>(x, rows, columns, left + j, rank, sum + j * columns);
  }
  for (; j < rank; ++j) {
    reduce_rank<1>(x, rows, columns, left + j, rank, sum + j * columns);
  }
}

// A panel in acc_t: either the caller's own memory, or a copy that is converted and masked.
template <typename scalar_t, typename acc_t>
class Panel {
 public:
  Panel(int64_t rows, int64_t columns, const Dropout& dropout)
      : columns_(columns), dropout_(dropout) {
    if (copies()) {
      values_.reset(new acc_t[rows * columns]);
    }
    if (dropout.active()) {
      mask_.reset(new acc_t[rows * columns]);
    }
  }

  // X ∘ M of the given rows
  const acc_t* read(const scalar_t* x, int64_t first_row, int64_t rows) {
    if (dropout_.active()) {
      draw_mask(first_row, rows);
    }
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      if (!dropout_.active()) {
        return x;
      }
    }
    acc_t* values = values_.get();
    const int64_t count = rows * columns_;
    if (dropout_.active()) {
      const acc_t* mask = mask_.get();
      for (int64_t i = 0; i < count; ++i) {
        values[i] = to_acc(x[i]) * mask[i];
      }
    } else {
      for (int64_t i = 0; i < count; ++i) {
        values[i] = to_acc(x[i]);
      }
    }
    return values;
  }

  // The multipliers of the rows last read, or null without dropout
  const acc_t* mask() const { return mask_.get(); }

 private:
  bool copies() const { return dropout_.active() || !std::is_same_v<scalar_t, acc_t>; }

  void draw_mask(int64_t first_row, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row) {
      acc_t* mask = mask_.get() + row * columns_;
      int64_t column = 0;
      for (; column + kDropoutBlock <= columns_; column += kDropoutBlock) {
        dropout_block(dropout_, first_row + row, column / kDropoutBlock, mask + column);
      }
      if (column < columns_) {
        acc_t tail[kDropoutBlock];
        dropout_block(dropout_, first_row + row, column / kDropoutBlock, tail);
        std::copy(tail, tail + (columns_ - column), mask + column);
      }
    }
  }

  int64_t columns_;
  const Dropout& dropout_;
  std::unique_ptr<acc_t[]> values_;
  std::unique_ptr<acc_t[]> mask_;
};

// Calls body(first, count) for the panels of `rows`.
template <typename acc_t, typename F>
void for_each_panel(int64_t rows, int64_t columns, const F& body) {
  const int64_t step = panel_rows<acc_t>(rows, columns);
  for (int64_t row = 0; row < rows; row += step) {
    body(row, std::min(step, rows - row));
  }
}

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
    project_panel(values, count, columns, right, rank, hidden + row * rank);
  });
}

template <typename scalar_t, typename acc_t>
void update(scalar_t* y,
            int64_t rows,
            int64_t columns,
            const acc_t* left,
            const acc_t* right,
            int64_t rank,
            acc_t scale) {
  update_panel<scalar_t, acc_t>(y, nullptr, rows, columns, left, right, rank, scale);
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
    project_panel(values, count, columns, right, rank, hidden + row * rank);
    reduce_panel(values, count, columns, left + row * rank, rank, sum);
  });
}

template <typename scalar_t, typename acc_t>
void update_reduce(const scalar_t* x,
                   scalar_t* y,
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
      update_panel<scalar_t, acc_t>(y + row * columns, panel.mask(), count, columns, l, right, rank,
                                    acc_t(1));
    }
  });
}

template <typename scalar_t>
constexpr LowRankKernels<scalar_t> table() {
  using acc_t = typename AccOf<scalar_t>::type;
  return {&project<scalar_t, acc_t>, &update<scalar_t, acc_t>, &project_reduce<scalar_t, acc_t>,
          &update_reduce<scalar_t, acc_t>};
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
