#include "ops/cpu/lora_rite.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "ops/cpu/dense_product.h"
#include "ops/cpu/factor_gram.h"
#include "ops/cpu/factor_panel.h"
#include "ops/cpu/rite_side.h"
#include "ops/cpu/squares.h"
#include "ops/cpu/symmetric_eigen.h"

namespace gauge_ext {
namespace {

constexpr int64_t kStepBytes = 24 * 1024;  // of each of five panels, in the second-level cache
constexpr int64_t kTurnBytes = 64 * 1024;  // of each of two: sums over few columns cost more each

template <typename acc_t>
int64_t columns_of_panel(int64_t rank, int64_t bytes) {
  constexpr int64_t kUnit = kTriangleVectors * kWidth<acc_t>;
  const int64_t fitting = bytes / (rank * static_cast<int64_t>(sizeof(acc_t)));
  return std::clamp<int64_t>(fitting / kUnit * kUnit, kUnit, 512);
}

// body(range) for the panels of a side
template <typename acc_t, typename F>
void for_each_range(int64_t length, int64_t columns, const F& body) {
  for_each_piece(length, columns, [&](int64_t first, int64_t count) {
    body(PanelRange{first, count, panel_width<acc_t>(count)});
  });
}

// own_turn = (Eᵀ X F_oldᵀ)ᵀ for the effective factor X as a panel of all its vectors
template <typename scalar_t, typename acc_t = typename AccOf<scalar_t>::type>
void measure_turn(const Side<scalar_t>& side,
                  const Squares& squares,
                  const double* e,
                  double* sum) {
  const int64_t r = side.factor.rank, rows = (r + 3) / 4 * 4;
  static thread_local Scratch<acc_t> scratch;
  const int64_t columns = columns_of_panel<acc_t>(r, kTurnBytes);
  const int64_t room = rows * columns;
  acc_t* x = scratch.reserve(2 * room);
  acc_t* old = x + room;
  squares.clear(sum);
  for_each_range<acc_t>(side.factor.length, columns, [&](const PanelRange& p) {
    side.factor.read(p, x);
    read_kept(side.frame, side.factor.length, r, p, old);
    std::fill(x + r * p.width, x + rows * p.width, acc_t(0));
    std::fill(old + r * p.width, old + rows * p.width, acc_t(0));
    add_cross_products(x, old, p.width, r, sum, squares.stride());
  });
  for (int64_t i = 0; i < squares.size(); ++i) {
    sum[i] *= side.effective;
  }
  squares.product(sum, e, side.own_turn, Shape::kDense, Shape::kUpper);
}

// The new second moments of a side's gradients, without gaps; false where they are not finite
template <typename scalar_t>
bool measure_moment(const Side<scalar_t>& side,
                    const Squares& squares,
                    const FactorStep& step,
                    const double* e,
                    double* work,
                    double* moment) {
  // In float64 the gradients are whitened before their Gram matrix is taken, which else would have
  // the square of the gauge's condition; in float32 their own rounding is coarser than that.
  constexpr bool kFirst = std::is_same_v<scalar_t, double>;
  const int64_t r = side.factor.rank, stride = squares.stride();
  double* fresh = work;
  double* carried = fresh + squares.size();
  double* room = carried + squares.size();
  std::fill(moment, moment + r * r, 0.0);
  GramSum gram(r, kFirst ? side.other : nullptr, moment);
  if (side.grad.in_rows) {
    gram.add_rows(side.grad.data, side.grad.length, 1.0);
  } else {
    gram.add_columns(side.grad.data, side.grad.length);
  }
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < i; ++j) {
      moment[i * r + j] = moment[j * r + i];
    }
  }
  squares.read(moment, fresh);
  if constexpr (!kFirst) {
    squares.congruence(e, Shape::kUpper, fresh, room);
  }
  squares.read(side.moment, carried);
  squares.congruence(side.turn, Shape::kDense, carried, room);
  const double units = step.grad_scale / side.effective;
  const double weight = (1 - step.second) * units * units / static_cast<double>(side.grad.length);
  double check = 0;  // NaN unless all are finite
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      const double value = step.second * carried[i * stride + j] + weight * fresh[i * stride + j];
      moment[i * r + j] = moment[j * r + i] = value;
      check += value * 0;
    }
  }
  return check == 0;
}

template <typename scalar_t>
bool measure(const RiteLayer<scalar_t>& layer,
             const FactorMetric& metric,
             const FactorStep& step,
             const RiteTurns& turns,
             double* moment_A,
             double* moment_B) {
  const Squares squares(layer.factors.rank);
  const int64_t size = squares.size();
  static thread_local Scratch<double> scratch;
  double* e_a = scratch.reserve(5 * size);
  double* e_m = e_a + size;
  double* work = e_m + size;  // three
  squares.read(metric.e_a, e_a);
  squares.read(metric.e_m, e_m);
  const auto of_A = side_A(layer, metric, turns);
  const auto of_B = side_B(layer, metric, turns);
  measure_turn(of_A, squares, e_a, work);
  measure_turn(of_B, squares, e_m, work);
  // The frame that is not the anchor's goes on along the anchor's, for the damping: Kᵀ P K_old
  const bool anchor_B = layer.factors.anchor_B;
  squares.product(anchor_B ? e_m : e_a, anchor_B ? e_a : e_m, turns.rest, Shape::kUpper,
                  Shape::kUpper);
  for (int64_t i = 0; i < size; ++i) {
    turns.rest[i] *= metric.root_damping;
  }
  squares.transpose(anchor_B ? turns.frame_B : turns.frame_A, work);
  squares.product(work, turns.rest, work + size);
  squares.read(layer.rest, work);
  squares.product(work, work + size, work + 2 * size);
  squares.add(work + 2 * size, 1, anchor_B ? turns.frame_A : turns.frame_B);
  const bool finite_A = measure_moment(of_A, squares, step, e_m, work, moment_A);
  const bool finite_B = measure_moment(of_B, squares, step, e_a, work, moment_B);
  return finite_A && finite_B;
}

// (v̂^½ + ε)⁻¹ by the eigenvectors of v: Zᵀ Z, whose rows are the eigenvectors times the roots
bool inverse_roots(const double* moment, int64_t r, const FactorStep& step, double* root) {
  const Squares squares(r);
  const int64_t size = squares.size(), stride = squares.stride();
  static thread_local Scratch<double> scratch;
  double* matrix = scratch.reserve(2 * size + 4 * stride);
  double* vectors = matrix + size;
  double* values = vectors + size;
  squares.read(moment, matrix);
  if (!symmetric_eigen(matrix, r, stride, values, vectors, values + stride)) {
    return false;
  }
  const double largest = *std::max_element(values, values + r);
  for (int64_t i = 0; i < r; ++i) {
    const double factor = square_root(inverse_root(values[i], largest, step));
    for (int64_t j = 0; j < r; ++j) {
      vectors[i * stride + j] *= factor;
    }
  }
  std::fill(root, root + r * r, 0.0);
  add_gram(vectors, r, r, stride, root);
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < i; ++j) {
      root[i * r + j] = root[j * r + i];
    }
  }
  return true;
}

template <typename scalar_t>
void descend_side(const Side<scalar_t>& side, const FactorStep& step, const RiteMoment& moment) {
  using acc_t = typename AccOf<scalar_t>::type;
  const int64_t r = side.factor.rank, length = side.factor.length;
  const Squares squares(r);
  const int64_t size = squares.size(), stride = squares.stride();
  static thread_local Scratch<double> matrices;
  double* transposed = matrices.reserve(5 * size);  // Eᵀ
  double* root = transposed + size;
  double* blended = root + size;  // E (v̂^½ + ε)⁻¹
  double* work = blended + size;
  squares.read(side.other, work);
  squares.transpose(work, transposed);
  squares.read(moment.root, root);
  squares.product(transposed, root, blended, Shape::kLower);
  if (side.rest != nullptr) {  // the step is E (I - Kᵀ K) q
    squares.symmetric_product(side.rest, side.rest, work);
    squares.product(work, transposed, root, Shape::kDense, Shape::kLower);
    squares.add(root, -1, transposed);
  }

  static thread_local Scratch<acc_t> scratch;
  const int64_t columns = columns_of_panel<acc_t>(r, kStepBytes);
  const int64_t room = r * columns;
  acc_t* into =
      scratch.reserve(4 * r * r + 4 * room);  // (2 r, r): of the old average, the gradient
  acc_t* back = into + 2 * r * r;
  acc_t* own = back + r * r;
  acc_t* panels = own + r * r;  // the old average and the gradient, below it
  acc_t* average = panels + 2 * room;
  acc_t* x = average + room;
  const double fresh = (1 - step.average) * step.grad_scale / side.effective;
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < r; ++j) {
      into[i * r + j] = static_cast<acc_t>(step.average * side.turn[i * stride + j]);
      into[(r + i) * r + j] = static_cast<acc_t>(fresh * blended[i * stride + j]);
      back[i * r + j] = static_cast<acc_t>(transposed[i * stride + j]);
      own[i * r + j] = static_cast<acc_t>(side.effective * side.own[i * r + j]);
    }
  }
  const auto keep = static_cast<acc_t>(step.keep);
  const auto rate = static_cast<acc_t>(step.lr / (step.correction1 * side.effective));
  for_each_range<acc_t>(length, columns, [&](const PanelRange& p) {
    read_kept(side.avg, length, r, p, panels);
    side.grad.read(p, panels + r * p.width);
    side.factor.read(p, x);
    const auto keep_average = [&](int64_t k, int64_t c, const Vec<acc_t>& value) GAUGE_EXT_INLINE {
      prefetch(side.frame + k * length + p.first + c);
      prefetch(side.avg + k * length + p.first + p.count + c);
      store<acc_t>(average + k * p.width + c, value);
      store_kept(value, k, c, p, length, side.avg);
    };
    const auto keep_frame = [&](int64_t k, int64_t c, const Vec<acc_t>& value) GAUGE_EXT_INLINE {
      side.grad.prefetch_next(p, k, c);
      store_kept(value, k, c, p, length, side.frame);
    };
    dense_left_product(panels, p.width, into, 2 * r, r, r, keep_average);
    left_product(x, p.width, own, r, r, Triangle::kUpper, keep_frame);
    const auto move = [&](int64_t k, int64_t c, const Vec<acc_t>& value) GAUGE_EXT_INLINE {
      side.factor.prefetch_next(p, k, c);
      acc_t* to = x + k * p.width + c;
      store<acc_t>(to, keep * load<acc_t>(to) - rate * value);
    };
    if (side.rest != nullptr) {
      dense_left_product(average, p.width, back, r, r, r, move);
    } else {
      left_product(average, p.width, back, r, r, Triangle::kLower, move);
    }
    side.factor.write(p, x);
  });
  std::copy(moment.value, moment.value + r * r, side.moment);
}

template <typename scalar_t>
void descend(const RiteLayer<scalar_t>& layer,
             const FactorMetric& metric,
             const FactorStep& step,
             const RiteTurns& turns,
             const RiteMoment& moment_A,
             const RiteMoment& moment_B) {
  descend_side(side_A(layer, metric, turns), step, moment_A);
  descend_side(side_B(layer, metric, turns), step, moment_B);
  Squares(layer.factors.rank).write(turns.rest, layer.rest);
}

template <typename scalar_t>
constexpr RiteKernels<scalar_t> table() {
  return {&measure<scalar_t>, &inverse_roots, &descend<scalar_t>};
}

}  // namespace

namespace CPU_CAPABILITY {

extern const RiteKernels<float> rite_float;
extern const RiteKernels<double> rite_double;
extern const RiteKernels<BFloat16Bits> rite_bfloat16;

const RiteKernels<float> rite_float = table<float>();
const RiteKernels<double> rite_double = table<double>();
const RiteKernels<BFloat16Bits> rite_bfloat16 = table<BFloat16Bits>();

}  // namespace CPU_CAPABILITY
}  // namespace gauge_ext
