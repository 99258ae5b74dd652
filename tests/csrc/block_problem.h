#pragma once

// A block-quantized weight with an update, and plain loops in double for what becomes of it.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "blocks/requantize.h"
#include "math/storage.h"

namespace gauge_ext::test {

inline double uniform(uint32_t& state) {  // in [-1, 1)
  state = state * 1664525u + 1013904223u;
  return double(state >> 8) / double(1u << 23) - 1;
}

// A weight and what is to happen to it, in memory of its own.
struct BlockProblem {
  BlockRows weight{};
  std::vector<uint8_t> codes, scales, zero_points;
  std::vector<float> left, right;
  std::vector<double> magnitude;

  BlockProblem(int bits,
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

}  // namespace gauge_ext::test
