// Blocks changed and rounded again against plain loops in double: which codes are nearest, which
// scales err less, for every format of a block, with tails and padding.

#include "blocks/requantize.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "block_problem.h"
#include "check_main.h"

namespace {

using namespace gauge_ext;
using gauge_ext::test::BlockProblem;

bool close(double got, double expected, double tolerance) {
  return std::abs(got - expected) <= tolerance * std::abs(expected);
}

void check(BlockProblem problem) {
  const BlockProblem before = problem;
  const BlockSums sums = problem.run();
  const BlockRows& weight = problem.weight;
  REQUIRE(sums.finite);
  double error = 0, moved = 0, total = 0;
  for (int64_t row = 0; row < weight.rows; ++row) {
    const std::vector<double> wanted = before.changed_row(row);
    for (int64_t block = 0; block < weight.blocks(); ++block) {
      const double* values = wanted.data() + block * weight.block_size;
      double here = 0, squares = 0;
      for (int64_t j = 0; j < weight.block_size; ++j) {
        here += std::pow(problem.value(row, block, j) - values[j], 2);
        squares += values[j] * values[j];
        if (block * weight.block_size + j < weight.columns) {
          moved += std::pow(values[j] - before.value(row, block, j), 2);
        }
      }
      // What is stored is as good as the better of the two, up to float32's own rounding.
      const double least =
          std::min(before.least_error(values, before.scale(row, block), before.zero(row, block)),
                   before.spanning_error(values));
      CHECK(std::abs(here - least) <= 2e-4 * least + 1e-12 * squares);
      error += here;
      total += squares;
    }
  }
  if (weight.zeros == ZeroPoints::kCodes && weight.blocks() * weight.bits % 8 != 0) {
    for (int64_t end = weight.zero_row_bytes(); end <= int64_t(problem.zero_points.size());
         end += weight.zero_row_bytes()) {
      CHECK(problem.zero_points[end - 1] >> 4 == 0);  // the half of a byte that no block has
    }
  }
  CHECK(close(sums.error, error, 2e-4));
  CHECK(close(sums.moved, moved, 1e-4));
  CHECK(close(sums.total, total, 1e-5));
}

constexpr ScaleFormat kFormats[] = {ScaleFormat::kFloat32, ScaleFormat::kFloat16,
                                    ScaleFormat::kBFloat16};
constexpr ZeroPoints kZeros[] = {ZeroPoints::kNone, ZeroPoints::kCodes, ZeroPoints::kNumbers};

TEST_CASE("blocks of every format, with fewer blocks than lanes and with padding") {
  for (const int bits : {4, 8}) {
    for (const ScaleFormat format : kFormats) {
      for (const ZeroPoints zeros : kZeros) {
        check(BlockProblem(bits, 32, 7, 5 * 32 - 9, 3, format, zeros, false));
        check(BlockProblem(bits, 16, 3, 33 * 16, 8, format, zeros, false));
        check(BlockProblem(bits, 64, 9, 1, 1, format, zeros, false));
      }
    }
  }
}

TEST_CASE("large blocks and large ranks") {
  for (const int bits : {4, 8}) {
    check(BlockProblem(bits, 128, 2, 1000, 64, ScaleFormat::kFloat32, ZeroPoints::kCodes, false));
    check(BlockProblem(bits, 256, 13, 700, 17, ScaleFormat::kFloat32, ZeroPoints::kNone, false));
  }
}

TEST_CASE("DoRA's lengths leave padding alone") {
  for (const int bits : {4, 8}) {
    for (const ZeroPoints zeros : kZeros) {
      check(BlockProblem(bits, 32, 9, 23 * 32 - 5, 4, ScaleFormat::kFloat32, zeros, true));
      check(BlockProblem(bits, 16, 3, 7, 2, ScaleFormat::kFloat16, zeros, true));
    }
  }
}

TEST_CASE("rows of zeros have no length to be given") {
  BlockProblem problem(4, 16, 2, 40, 1, ScaleFormat::kFloat32, ZeroPoints::kCodes, true);
  std::fill(problem.scales.begin(), problem.scales.end(), uint8_t(0));
  std::fill(problem.left.begin(), problem.left.end(), 0.0f);
  const BlockSums sums = problem.run();
  CHECK(sums.finite);
  CHECK(sums.error == 0);
  CHECK(sums.total == 0);
}

TEST_CASE("blocks that an update does not touch stay, byte for byte") {
  for (const int bits : {4, 8}) {
    for (const ScaleFormat format : kFormats) {
      for (const ZeroPoints zeros : kZeros) {
        BlockProblem problem(bits, 32, 5, 9 * 32 - 3, 2, format, zeros, false);
        for (int64_t row = 0; row < 5; ++row) {
          for (int64_t block = 0; block < 9; ++block) {
            if (problem.scale(row, block) == 0) {  // whose codes say nothing
              problem.set_number(problem.scales, row * 9 + block, 0.5);
            }
          }
          if (zeros == ZeroPoints::kCodes && bits == 4) {
            problem.zero_points[row * 5 + 4] &= 15;  // of nine, the tenth is padding
          }
        }
        std::fill(problem.left.begin(), problem.left.end(), 0.0f);
        const BlockProblem before = problem;
        const BlockSums sums = problem.run();
        CHECK(sums.error == 0);
        CHECK(sums.moved == 0);
        CHECK(problem.codes == before.codes);
        CHECK(problem.scales == before.scales);
        CHECK(problem.zero_points == before.zero_points);
      }
    }
  }
}

TEST_CASE("scales whose reciprocals are no ordinary numbers") {
  for (const double size : {1e-40, 1e-36, 1e36}) {
    BlockProblem problem(8, 16, 3, 50, 1, ScaleFormat::kFloat32, ZeroPoints::kCodes, false);
    for (int64_t i = 0; i < 12; ++i) {
      problem.set_number(problem.scales, i, size);
    }
    for (float& value : problem.left) {
      value *= static_cast<float>(std::sqrt(size));
    }
    for (float& value : problem.right) {
      value *= static_cast<float>(100 * std::sqrt(size));
    }
    const BlockProblem before = problem;
    REQUIRE(problem.run().finite);
    for (int64_t row = 0; row < 3; ++row) {
      const std::vector<double> wanted = before.changed_row(row);
      for (int64_t c = 0; c < 64; ++c) {
        const double scale = problem.scale(row, c / 16);
        CHECK(std::abs(problem.value(row, c / 16, c % 16) - wanted[c]) <= 0.501 * scale + 3e-45);
      }
    }
  }
}

TEST_CASE("numbers that are not finite are told") {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const bool dora : {false, true}) {
    BlockProblem problem(4, 32, 8, 300, 2, ScaleFormat::kFloat32, ZeroPoints::kCodes, dora);
    BlockProblem other = problem;
    problem.set_number(problem.scales, 43, std::nan(""));
    CHECK(!problem.run().finite);
    other.right[299] = infinity;
    CHECK(!other.run().finite);
  }
  BlockProblem large(4, 32, 8, 300, 2, ScaleFormat::kFloat32, ZeroPoints::kCodes, false);
  large.set_number(large.scales, 5, 1e30);  // its square exceeds float32, but not the number
  CHECK(large.run().finite);
}

}  // namespace
