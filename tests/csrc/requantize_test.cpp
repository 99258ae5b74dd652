// Blocks changed and rounded again against plain loops in double: which codes are nearest, which
// scales err less, for every format of a block, with tails and padding.

#include "blocks/requantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "check_main.h"
#include "math/storage.h"

namespace {

using namespace gauge_ext;

double uniform(uint32_t& state) {  // in [-1, 1)
  state = state * 1664525u + 1013904223u;
  return double(state >> 8) / double(1u << 23) - 1;
}

// A weight and what is to happen to it, in memory of its own.
struct Problem {
  BlockRows weight{};
  std::vector<uint8_t> codes, scales, zero_points;
  std::vector<float> left, right;
  std::vector<double> magnitude;

  Problem(int bits,
          int64_t size,
          int64_t rows,
          int64_t columns,
          int64_t rank,
          ScaleFormat format,
          ZeroPoints zeros,
          bool dora) {
    weight.bits = bits;
    weight.block_size = size;
    weight.rows = rows;
    weight.columns = columns;
    weight.rank = rank;
    weight.format = format;
    weight.zeros = zeros;
    const int64_t blocks = rows * weight.blocks();
    uint32_t state = 7;
    codes.resize(blocks * weight.block_bytes());
    for (uint8_t& code : codes) {
      code = static_cast<uint8_t>(uniform(state) * 128 + 128);
    }
    scales.resize(blocks * weight.scale_bytes());
    for (int64_t i = 0; i < blocks; ++i) {
      // Some are 0, and some negative, as symmetric quantizers write them.
      set_number(scales, i, i % 11 == 10 ? 0 : 0.01 * (1.5 + uniform(state)) * (i % 3 ? 1 : -1));
    }
    zero_points.resize(rows * weight.zero_row_bytes());
    for (uint8_t& zero : zero_points) {
      zero = static_cast<uint8_t>(uniform(state) * 128 + 128);
    }
    if (zeros == ZeroPoints::kNumbers) {
      for (int64_t i = 0; i < blocks; ++i) {
        set_number(zero_points, i, (1 << (bits - 1)) * (1 + 0.5 * uniform(state)));
      }
    }
    left.resize(rows * rank);
    right.resize(rank * columns);
    for (float& value : left) {
      value = static_cast<float>(0.2 * uniform(state));
    }
    for (float& value : right) {
      value = static_cast<float>(0.2 * uniform(state));
    }
    for (int64_t i = 0; dora && i < rows; ++i) {
      magnitude.push_back(2 + uniform(state));
    }
  }

  BlockSums run() {
    weight.codes = codes.data();
    weight.scales = scales.data();
    weight.zero_points = zero_points.empty() ? nullptr : zero_points.data();
    weight.left = left.data();
    weight.right = right.data();
    weight.magnitude = magnitude.empty() ? nullptr : magnitude.data();
    const RequantizeKernels& kernels = requantize_kernels();
    std::vector<unsigned char> scratch(kernels.scratch_bytes(weight) + 64);
    unsigned char* aligned = scratch.data() + 64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64;
    return kernels.requantize(weight, aligned);
  }

  // A number rounded to the format of the scales.
  double rounded(double value) const {
    const float single = static_cast<float>(value);
    switch (weight.format) {
      case ScaleFormat::kFloat16:
        return widen(narrow<Float16Bits>(single));
      case ScaleFormat::kBFloat16:
        return widen(narrow<BFloat16Bits>(single));
      default:
        return single;
    }
  }

  void set_number(std::vector<uint8_t>& to, int64_t i, double value) const {
    const float single = static_cast<float>(value);
    if (weight.format == ScaleFormat::kFloat32) {
      std::memcpy(to.data() + 4 * i, &single, 4);
    } else if (weight.format == ScaleFormat::kFloat16) {
      const auto half = narrow<Float16Bits>(single);
      std::memcpy(to.data() + 2 * i, &half, 2);
    } else {
      const auto half = narrow<BFloat16Bits>(single);
      std::memcpy(to.data() + 2 * i, &half, 2);
    }
  }

  double number(const std::vector<uint8_t>& from, int64_t i) const {
    float single;
    Float16Bits half;
    BFloat16Bits upper;
    switch (weight.format) {
      case ScaleFormat::kFloat16:
        std::memcpy(&half, from.data() + 2 * i, 2);
        return widen(half);
      case ScaleFormat::kBFloat16:
        std::memcpy(&upper, from.data() + 2 * i, 2);
        return widen(upper);
      default:
        std::memcpy(&single, from.data() + 4 * i, 4);
        return single;
    }
  }

  double scale(int64_t row, int64_t block) const {
    return number(scales, row * weight.blocks() + block);
  }

  double zero(int64_t row, int64_t block) const {
    const uint8_t* codes_of_row = zero_points.data() + row * weight.zero_row_bytes();
    switch (weight.zeros) {
      case ZeroPoints::kNumbers:
        return number(zero_points, row * weight.blocks() + block);
      case ZeroPoints::kCodes:
        return code_at(codes_of_row, block);
      default:
        return 1 << (weight.bits - 1);
    }
  }

  int code_at(const uint8_t* from, int64_t i) const {
    return weight.bits == 8 ? from[i] : from[i / 2] >> (i % 2 * 4) & 15;
  }

  // Entry j of a block.
  double value(int64_t row, int64_t block, int64_t j) const {
    const uint8_t* from = codes.data() + (row * weight.blocks() + block) * weight.block_bytes();
    return (code_at(from, j) - zero(row, block)) * scale(row, block);
  }

  // V of a row, padding included.
  std::vector<double> changed_row(int64_t row) const {
    const int64_t size = weight.block_size;
    std::vector<double> values(weight.blocks() * size);
    double squares = 0;
    for (size_t c = 0; c < values.size(); ++c) {
      values[c] = value(row, int64_t(c) / size, int64_t(c) % size);
      if (int64_t(c) < weight.columns) {
        for (int64_t k = 0; k < weight.rank; ++k) {
          values[c] += double(left[row * weight.rank + k]) * right[k * weight.columns + c];
        }
        squares += values[c] * values[c];
      }
    }
    if (!magnitude.empty()) {
      for (int64_t c = 0; c < weight.columns; ++c) {
        values[c] *= squares > 0 ? magnitude[row] / std::sqrt(squares) : 0;
      }
    }
    return values;
  }

  // The least that a block can err with a scale and a zero point.
  double least_error(const double* values, double scale, double zero) const {
    double sum = 0;
    for (int64_t j = 0; j < weight.block_size; ++j) {
      const double step = std::rint(values[j] / (scale == 0 ? 1 : scale) + zero);
      const double code = std::clamp<double>(step, 0, (1 << weight.bits) - 1);
      sum += std::pow((code - zero) * scale - values[j], 2);
    }
    return sum;
  }

  double spanning_error(const double* values) const {
    double low = *std::min_element(values, values + weight.block_size);
    double high = *std::max_element(values, values + weight.block_size);
    const double middle = 1 << (weight.bits - 1), top = (1 << weight.bits) - 1;
    if (weight.zeros == ZeroPoints::kNone) {
      return least_error(values, rounded((-low > high ? low : high) / -middle), middle);
    }
    low = std::min(low, 0.0);
    high = std::max(high, 0.0);
    const double scale = (high - low) / top;
    const double zero = scale == 0 ? 0 : std::rint(-low / scale);
    return least_error(values, rounded(scale), std::clamp(zero, 0.0, top));
  }
};

bool close(double got, double expected, double tolerance) {
  return std::abs(got - expected) <= tolerance * std::abs(expected);
}

void check(Problem problem) {
  const Problem before = problem;
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
        check(Problem(bits, 32, 7, 5 * 32 - 9, 3, format, zeros, false));
        check(Problem(bits, 16, 3, 33 * 16, 8, format, zeros, false));
        check(Problem(bits, 64, 9, 1, 1, format, zeros, false));
      }
    }
  }
}

TEST_CASE("large blocks and large ranks") {
  for (const int bits : {4, 8}) {
    check(Problem(bits, 128, 2, 1000, 64, ScaleFormat::kFloat32, ZeroPoints::kCodes, false));
    check(Problem(bits, 256, 13, 700, 17, ScaleFormat::kFloat32, ZeroPoints::kNone, false));
  }
}

TEST_CASE("DoRA's lengths leave padding alone") {
  for (const int bits : {4, 8}) {
    for (const ZeroPoints zeros : kZeros) {
      check(Problem(bits, 32, 9, 23 * 32 - 5, 4, ScaleFormat::kFloat32, zeros, true));
      check(Problem(bits, 16, 3, 7, 2, ScaleFormat::kFloat16, zeros, true));
    }
  }
}

TEST_CASE("rows of zeros have no length to be given") {
  Problem problem(4, 16, 2, 40, 1, ScaleFormat::kFloat32, ZeroPoints::kCodes, true);
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
        Problem problem(bits, 32, 5, 9 * 32 - 3, 2, format, zeros, false);
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
        const Problem before = problem;
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
    Problem problem(8, 16, 3, 50, 1, ScaleFormat::kFloat32, ZeroPoints::kCodes, false);
    for (int64_t i = 0; i < 12; ++i) {
      problem.set_number(problem.scales, i, size);
    }
    for (float& value : problem.left) {
      value *= static_cast<float>(std::sqrt(size));
    }
    for (float& value : problem.right) {
      value *= static_cast<float>(100 * std::sqrt(size));
    }
    const Problem before = problem;
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
    Problem problem(4, 32, 8, 300, 2, ScaleFormat::kFloat32, ZeroPoints::kCodes, dora);
    Problem other = problem;
    problem.set_number(problem.scales, 43, std::nan(""));
    CHECK(!problem.run().finite);
    other.right[299] = infinity;
    CHECK(!other.run().finite);
  }
  Problem large(4, 32, 8, 300, 2, ScaleFormat::kFloat32, ZeroPoints::kCodes, false);
  large.set_number(large.scales, 5, 1e30);  // its square exceeds float32, but not the number
  CHECK(large.run().finite);
}

}  // namespace
