#pragma once

// Algebra of dense r x r matrices in float64 by the register tiles of triangle.h.

#include <algorithm>
#include <cstdint>

#include "ops/cpu/factor_panel.h"
#include "ops/cpu/triangle.h"

namespace gauge_ext {
namespace {

enum class Shape { kDense, kUpper, kLower };  // where the entries are that are not zero

// r x r matrices in float64 with rows that are whole vectors, zeros behind their entries
class Squares {
 public:
  explicit Squares(int64_t rank) : rank_(rank), stride_(panel_width<double>(rank)) {}

  int64_t stride() const { return stride_; }
  int64_t size() const { return rank_ * stride_; }

  void clear(double* x) const { std::fill(x, x + size(), 0.0); }

  // From rows without gaps, times a factor
  void read(const double* from, double* to, double scale = 1) const {
    for (int64_t i = 0; i < rank_; ++i) {
      for (int64_t j = 0; j < stride_; ++j) {
        to[i * stride_ + j] = j < rank_ ? scale * from[i * rank_ + j] : 0.0;
      }
    }
  }

  void write(const double* from, double* to) const {
    for (int64_t i = 0; i < rank_; ++i) {
      std::copy(from + i * stride_, from + i * stride_ + rank_, to + i * rank_);
    }
  }

  void transpose(const double* from, double* to) const {
    clear(to);
    for (int64_t i = 0; i < rank_; ++i) {
      for (int64_t j = 0; j < rank_; ++j) {
        to[j * stride_ + i] = from[i * stride_ + j];
      }
    }
  }

  // Y = Eᵀ X, without the zeros of both
  void product(const double* e,
               const double* x,
               double* y,
               Shape of_e = Shape::kDense,
               Shape of_x = Shape::kDense) const {
    strips(e, x, y, of_e, of_x, false);
  }

  // The same where Y is symmetric
  void symmetric_product(const double* e,
                         const double* x,
                         double* y,
                         Shape of_e = Shape::kDense) const {
    strips(e, x, y, of_e, Shape::kDense, true);
    mirror(y);
  }

  // S becomes Eᵀ S E, S symmetric
  void congruence(const double* e, Shape of_e, double* s, double* work) const {
    product(s, e, work, Shape::kDense, of_e);
    symmetric_product(e, work, s, of_e);
  }

  // The lower half becomes the upper one.
  void mirror(double* x) const {
    for (int64_t i = 0; i < rank_; ++i) {
      for (int64_t j = 0; j < i; ++j) {
        x[i * stride_ + j] = x[j * stride_ + i];
      }
    }
  }

  void add(const double* x, double scale, double* to) const {
    for (int64_t i = 0; i < size(); ++i) {
      to[i] += scale * x[i];
    }
  }

 private:
  void strips(const double* e, const double* x, double* y, Shape of_e, Shape of_x, bool upper)
      const {
    int64_t j = 0;
    for (; j + kTriangleRows <= rank_; j += kTriangleRows) {
      strip<kTriangleRows>(e, x, y, j, of_e, of_x, upper);
    }
    if (j + 4 <= rank_) {
      strip<4>(e, x, y, j, of_e, of_x, upper);
      j += 4;
    }
    for (; j < rank_; ++j) {
      strip<1>(e, x, y, j, of_e, of_x, upper);
    }
  }

  template <int ROWS>
  void strip(const double* e,
             const double* x,
             double* y,
             int64_t j,
             Shape of_e,
             Shape of_x,
             bool upper) const {
    constexpr int64_t kStep = kTriangleVectors * kWidth<double>;
    for (int64_t c = upper ? j / kStep * kStep : 0; c < stride_; c += kStep) {
      const int64_t from =
          std::max(of_e == Shape::kLower ? j : 0, of_x == Shape::kLower ? c : int64_t{0});
      const int64_t to = std::min(of_e == Shape::kUpper ? j + ROWS : rank_,
                                  of_x == Shape::kUpper ? std::min(c + kStep, rank_) : rank_);
      left_tile<ROWS>(x + c, stride_, e + j, stride_, from, to, j, c, StoreTo<double>{y, stride_});
    }
  }

  int64_t rank_;
  int64_t stride_;
};

}  // namespace
}  // namespace gauge_ext
