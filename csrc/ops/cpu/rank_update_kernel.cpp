#include "ops/cpu/rank_update.h"

#include <algorithm>

#include "ops/cpu/rank_tile.h"
#include "ops/cpu/rounding.h"
#include "ops/cpu/vec.h"

namespace gauge_ext {
namespace {

template <typename scalar_t, typename acc_t>
struct Update {
  const scalar_t* weight;
  int64_t weight_stride;
  scalar_t* out;
  int64_t out_stride;
  int64_t columns;
  const acc_t* left;
  int64_t rank;
  const Rounding* rounding;
};

// What a tile adds up in registers. `check` becomes NaN where an entry is not finite, which 0 times
// infinity and 0 times NaN are; of entries in 16 bits `special` becomes all ones.
template <typename acc_t>
struct Lanes {
  Vec<acc_t> check = {}, delta = {}, kept = {}, lost = {};
  Packed special = {};

  void add(const Lanes& other) {
    check += other.check;
    special |= other.special;
    delta += other.delta;
    kept += other.kept;
    lost += other.lost;
  }

  void flush(UpdateSums& sums) const {
    for (int lane = 0; lane < kWidth<acc_t>; ++lane) {
      sums.delta += delta[lane];
      sums.kept += kept[lane];
      sums.lost += lost[lane];
    }
    sums.finite = sums.finite && horizontal_sum<acc_t>(check) == acc_t(0);
    for (int lane = 0; lane < 2 * kWords; ++lane) {
      sums.finite = sums.finite && special[lane] == 0;
    }
  }
};

// One vector of one row: W + D, rounded and written.
template <bool FIDELITY, bool STOCHASTIC, typename scalar_t, typename acc_t>
inline __attribute__((always_inline)) void finish(const scalar_t* from,
                                                  scalar_t* to,
                                                  const Vec<acc_t>& delta,
                                                  const uint32_t* draw,
                                                  Lanes<acc_t>& lanes) {
  const Vec<acc_t> weight = read(from);
  const Vec<acc_t> exact = weight + delta;
  Vec<acc_t> stored;
  if constexpr (STOCHASTIC) {
    Words bits;
    std::memcpy(&bits, draw, sizeof(bits));
    stored = stochastic<scalar_t>(exact, bits);
  } else {
    stored = nearest<scalar_t, acc_t>(exact);
  }
  write<scalar_t, acc_t>(to, stored);
  lanes.check += stored * acc_t(0);
  if constexpr (FIDELITY) {
    const Vec<acc_t> kept = stored - weight, lost = delta - kept;
    lanes.delta += delta * delta;
    lanes.kept += kept * kept;
    lanes.lost += lost * lost;
  }
}

// The same of two vectors that are to be rounded to 16 bits, written as one.
template <typename scalar_t>
inline GAUGE_EXT_INLINE void finish_pair(const scalar_t* from,
                                         scalar_t* to,
                                         const Vec<float>& first,
                                         const Vec<float>& second,
                                         Lanes<float>& lanes) {
  const Packed packed =
      nearest_pair<scalar_t>(read(from) + first, read(from + kWidth<float>) + second);
  std::memcpy(to, &packed, sizeof(packed));
  lanes.special |= not_finite<scalar_t>(packed);
}

// A function of its own: where it were a piece of a loop, the compiler would keep constants and
// sums in registers over the multiplication, which needs all of them.
template <int ROWS, int VECTORS, bool FIDELITY, bool STOCHASTIC, typename scalar_t, typename acc_t>
__attribute__((noinline)) void tile(const Update<scalar_t, acc_t>& u,
                                    const LeftRows<ROWS, acc_t>& left,
                                    const Block<acc_t>& block,
                                    int64_t row,
                                    int64_t column,
                                    const RowBits* bits,
                                    Lanes<acc_t>& lanes) {
  const int64_t weight_stride = u.weight_stride, out_stride = u.out_stride;
  const scalar_t* weight = u.weight + row * weight_stride + column;
  scalar_t* out = u.out + row * out_stride + column;
  Vec<acc_t> sum[ROWS][VECTORS];
  set_zero(sum);
  multiply(block, left, column, sum);
  // In variables of its own, which stay in registers: a store to `out` could change the others.
  Lanes<acc_t> own;
  if constexpr (sizeof(scalar_t) == 2 && VECTORS == 2 && !FIDELITY && !STOCHASTIC) {
    repeat<ROWS>([&](int i) GAUGE_EXT_INLINE {
      finish_pair(weight + i * weight_stride, out + i * out_stride, sum[i][0], sum[i][1], own);
    });
  } else {
    repeat<ROWS * VECTORS>([&](int n) GAUGE_EXT_INLINE {
      const int i = n / VECTORS, v = n % VECTORS;
      const int64_t c = v * kWidth<acc_t>;
      const uint32_t* draw = STOCHASTIC ? bits[i].bits + (column + c) % kDropoutBlock : nullptr;
      finish<FIDELITY, STOCHASTIC>(weight + i * weight_stride + c, out + i * out_stride + c,
                                   sum[i][v], draw, own);
    });
  }
  lanes.add(own);
}

// The columns that do not fill a vector, by the same arithmetic in one padded with zeros.
template <int ROWS, bool FIDELITY, bool STOCHASTIC, typename scalar_t, typename acc_t>
void tail(const Update<scalar_t, acc_t>& u,
          const LeftRows<ROWS, acc_t>& left,
          const Block<acc_t>& block,
          int64_t row,
          int64_t column,
          const RowBits* bits,
          Lanes<acc_t>& lanes) {
  const auto width = static_cast<size_t>(block.end - column);
  Vec<acc_t> sum[ROWS][1];
  set_zero(sum);
  multiply(block, left, column, sum);
  for (int i = 0; i < ROWS; ++i) {
    scalar_t from[kWidth<acc_t>] = {}, to[kWidth<acc_t>];
    std::memcpy(from, u.weight + (row + i) * u.weight_stride + column, width * sizeof(scalar_t));
    finish<FIDELITY, STOCHASTIC>(
        from, to, sum[i][0], STOCHASTIC ? bits[i].bits + column % kDropoutBlock : nullptr, lanes);
    std::memcpy(u.out + (row + i) * u.out_stride + column, to, width * sizeof(scalar_t));
  }
}

template <int ROWS, bool FIDELITY, bool STOCHASTIC, typename scalar_t, typename acc_t>
void rows_of_block(const Update<scalar_t, acc_t>& u,
                   const Block<acc_t>& block,
                   int64_t row,
                   UpdateSums& sums) {
  constexpr int64_t kStep = Block<acc_t>::kColumns;
  Lanes<acc_t> lanes;
  const LeftRows<ROWS, acc_t> left(u.left + row * u.rank, u.rank);
  RowBits bits[STOCHASTIC ? ROWS : 1];
  for (int64_t c = block.begin; c < block.end;) {
    int64_t stop = block.end;
    if constexpr (STOCHASTIC) {
      stop = std::min(c + kDropoutBlock, stop);
      for (int i = 0; i < ROWS; ++i) {
        bits[i].draw(*u.rounding, row + i, c / kDropoutBlock);
      }
    }
    for (; c + kStep <= stop; c += kStep) {
      tile<ROWS, kTileVectors, FIDELITY, STOCHASTIC>(u, left, block, row, c, bits, lanes);
    }
    for (; c + kWidth<acc_t> <= stop; c += kWidth<acc_t>) {
      tile<ROWS, 1, FIDELITY, STOCHASTIC>(u, left, block, row, c, bits, lanes);
    }
    if (c < stop) {
      tail<ROWS, FIDELITY, STOCHASTIC>(u, left, block, row, c, bits, lanes);
      c = stop;
    }
  }
  lanes.flush(sums);
}

template <bool FIDELITY, bool STOCHASTIC, typename scalar_t, typename acc_t>
void walk(const Update<scalar_t, acc_t>& u,
          const acc_t* right,
          int64_t first,
          int64_t rows,
          UpdateSums& sums) {
  const int64_t step = block_columns<acc_t>(u.rank);
  for (int64_t begin = 0; begin < u.columns; begin += step) {
    const Block<acc_t> block(right, u.columns, u.rank, begin, std::min(begin + step, u.columns));
    int64_t row = first;
    for (; row + kTileRows <= first + rows; row += kTileRows) {
      rows_of_block<kTileRows, FIDELITY, STOCHASTIC>(u, block, row, sums);
    }
    for (; row < first + rows; ++row) {
      rows_of_block<1, FIDELITY, STOCHASTIC>(u, block, row, sums);
    }
  }
}

template <typename scalar_t, typename acc_t>
void update(const scalar_t* weight,
            int64_t weight_stride,
            scalar_t* out,
            int64_t out_stride,
            int64_t first,
            int64_t rows,
            int64_t columns,
            const acc_t* left,
            const acc_t* right,
            int64_t rank,
            const Rounding* rounding,
            bool fidelity,
            UpdateSums& sums) {
  const Update<scalar_t, acc_t> u = {weight,  weight_stride, out,  out_stride,
                                     columns, left,          rank, rounding};
  if constexpr (!std::is_same_v<scalar_t, acc_t>) {
    if (rounding != nullptr) {
      return fidelity ? walk<true, true>(u, right, first, rows, sums)
                      : walk<false, true>(u, right, first, rows, sums);
    }
  }
  return fidelity ? walk<true, false>(u, right, first, rows, sums)
                  : walk<false, false>(u, right, first, rows, sums);
}

template <typename scalar_t>
constexpr RankUpdateKernels<scalar_t> table() {
  return {&update<scalar_t, typename AccOf<scalar_t>::type>};
}

}  // namespace

namespace CPU_CAPABILITY {

extern const RankUpdateKernels<float> rank_update_float;
extern const RankUpdateKernels<double> rank_update_double;
extern const RankUpdateKernels<BFloat16Bits> rank_update_bfloat16;
extern const RankUpdateKernels<Float16Bits> rank_update_half;

const RankUpdateKernels<float> rank_update_float = table<float>();
const RankUpdateKernels<double> rank_update_double = table<double>();
const RankUpdateKernels<BFloat16Bits> rank_update_bfloat16 = table<BFloat16Bits>();
const RankUpdateKernels<Float16Bits> rank_update_half = table<Float16Bits>();

}  // namespace CPU_CAPABILITY
}  // namespace gauge_ext
