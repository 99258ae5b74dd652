#pragma once

// Gram matrices of factors in float64, a piece at a time.

#include <algorithm>
#include <cstdint>

#include "ops/cpu/panel.h"
#include "ops/cpu/triangle.h"

namespace gauge_ext {
namespace {

// A piece of a factor that stays in the first-level cache with what is computed from it.
constexpr int64_t kPieceBytes = 16 * 1024;

// Columns of A in float64 that stay in the second-level cache while they are read for each tile.
constexpr int64_t kPanelBytes = 128 * 1024;

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

// Adds the Gram matrix of rows that come in pieces, each multiplied with E first if there is one.
class GramSum {
 public:
  GramSum(int64_t rank, const double* e, double* sum)
      : rank_(rank), stride_(gram_stride(rank)), sum_(sum) {
    static thread_local Scratch<double> scratch;
    piece_ = piece_size<double>(rank);
    const int64_t values = piece_ * stride_;
    columns_ = std::clamp<int64_t>(kPanelBytes / (sizeof(double) * stride_) / 16 * 16, 32, 512);
    double* memory = scratch.reserve(
        std::max(2 * values + (e != nullptr ? rank * stride_ : 0), columns_ * stride_));
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
    if (factor_ == nullptr) {
      add_columns_as_they_lie(x, count);
      return;
    }
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
  template <typename scalar_t>
  void add_columns_as_they_lie(const scalar_t* x, int64_t count) {
    for_each_piece(count, columns_, [&](int64_t first, int64_t columns) {
      const int64_t width = padded<double>(columns);
      for (int64_t k = 0; k < stride_; ++k) {
        double* to = rows_ + k * width;
        const int64_t filled = k < rank_ ? columns : 0;
        const scalar_t* from = filled > 0 ? x + k * count + first : nullptr;
        for (int64_t i = 0; i < filled; ++i) {
          to[i] = to_acc(from[i]);
        }
        for (int64_t i = filled; i < width; ++i) {
          to[i] = 0;
        }
      }
      add_row_products(rows_, width, rank_, sum_);
    });
  }

  void clear_padding(double* row) const {
    for (int64_t k = rank_; k < stride_; ++k) {
      row[k] = 0;
    }
  }

  void add(int64_t rows) {
    const double* x = rows_;
    if (factor_ != nullptr) {
      right_product(rows_, stride_, rows, factor_, rank_, stride_, Triangle::kUpper,
                    StoreTo<double>{moved_, stride_});
      x = moved_;
    }
    add_gram(x, rows, rank_, stride_, sum_);
  }

  int64_t rank_;
  int64_t stride_;
  int64_t piece_;
  int64_t columns_;
  double* sum_;
  double* rows_;
  double* moved_;
  double* factor_ = nullptr;
};

}  // namespace
}  // namespace gauge_ext
