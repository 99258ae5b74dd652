#pragma once

// Algebra of dense r x r matrices in float64 by register tiles, see dense_product.h.

#include <algorithm>
#include <cstdint>

#include "ops/cpu/dense_product.h"
#include "ops/cpu/factor_panel.h"

namespace gauge_ext {
namespace {

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

  // Y = Eᵀ X
  void product(const double* e, const double* x, double* y) const {
    dense_left_product(x, stride_, e, rank_, rank_, stride_, StoreTo<double>{y, stride_});
  }

  // S becomes Eᵀ S E, S symmetric
  void congruence(const double* e, double* s, double* work) const {
    product(s, e, work);
    product(e, work, s);
  }

  void add(const double* x, double scale, double* to) const {
    for (int64_t i = 0; i < size(); ++i) {
      to[i] += scale * x[i];
    }
  }

 private:
  int64_t rank_;
  int64_t stride_;
};

}  // namespace
}  // namespace gauge_ext
