#pragma once

// Rows of a block-quantized weight changed by a low-rank update and rounded to codes again, free of
// torch. W (rows, columns) is stored as codes q in blocks along its columns, with a scale s and a
// zero point z for each block: W = (q - z) s. The last block may reach beyond the columns; what it
// holds there is padding, which no update changes. What is computed:
//
//   V = W + L R                          L (rows, rank), R (rank, columns)
//   V = V m / |V|, row by row            where m, DoRA's magnitude, is given
//   q = clip(rint(V / s + z), 0, 2^bits - 1), with the old s and z or with those that span the
//   block, whichever leaves the smaller sum of squares (q - z) s - V; a tie keeps the old.
//
// The formulas in numpy are export/patching/block_rounding.py.

#include <cstdint>

namespace gauge_ext {

enum class ScaleFormat { kFloat32, kFloat16, kBFloat16 };

// None are in the middle, 2^(bits-1); codes are packed as those of the weight; numbers are in the
// format of the scales.
enum class ZeroPoints { kNone, kCodes, kNumbers };

struct BlockRows {
  int bits;               // of a code: 4, two to a byte with the first one low, or 8
  int64_t block_size;     // a power of two, at least 16
  int64_t rows, columns;  // of W
  ScaleFormat format;
  ZeroPoints zeros;
  // Changed in place, row by row: (rows, blocks, block_size * bits / 8), (rows, blocks), and
  // (rows, blocks) numbers or (rows, ceil(blocks * bits / 8)) bytes of codes; null for none.
  uint8_t* codes;
  uint8_t* scales;
  uint8_t* zero_points;
  const float* left;        // L
  const float* right;       // R
  int64_t rank;             // at least 1
  const double* magnitude;  // m, one for each row; null for none

  int64_t blocks() const { return (columns + block_size - 1) / block_size; }
  int64_t block_bytes() const { return block_size * bits / 8; }
  int64_t scale_bytes() const { return format == ScaleFormat::kFloat32 ? 4 : 2; }
  int64_t zero_row_bytes() const {
    switch (zeros) {
      case ZeroPoints::kCodes:
        return (blocks() * bits + 7) / 8;
      case ZeroPoints::kNumbers:
        return blocks() * scale_bytes();
      default:
        return 0;
    }
  }
};

// Summed over the entries, padding included where nothing else is said.
struct BlockSums {
  double error = 0;    // of ((q - z) s - V)²
  double moved = 0;    // of (V - W)², or (L R)² where there is no m; without padding
  double total = 0;    // of V²
  bool finite = true;  // every entry of V; if not, what was written is good for nothing
};

struct RequantizeKernels {
  // Blocks that are worked on at once, one to a lane of a vector.
  int64_t lanes;

  // How many bytes of scratch memory `requantize` wants.
  int64_t (*scratch_bytes)(const BlockRows& weight);

  // `scratch` is aligned to 64 bytes. Stops at the first number that is not finite.
  BlockSums (*requantize)(const BlockRows& weight, unsigned char* scratch);
};

// The kernels for the instruction set of this machine, see machine.h.
const RequantizeKernels& requantize_kernels();

}  // namespace gauge_ext
