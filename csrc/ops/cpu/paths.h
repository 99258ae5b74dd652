#pragma once

// Which of several ways to the same result is taken, by the sizes of a call. Each choice can be
// forced by an environment variable, read once: that is how the tests run every path.

#include <cstdint>

namespace gauge_ext {

enum class Choice { kAuto, kAlways, kNever };

// GAUGE_EXT_MERGED=auto|always|never: form W + s·B·A once for the call and multiply by that,
// instead of adding s·(x Aᵀ) Bᵀ row by row; only possible without dropout.
bool merged_forward(int64_t rows, int64_t in, int64_t out, bool wants_hidden);
bool merged_backward(int64_t rows, int64_t in, int64_t out);

// GAUGE_EXT_SMALL=auto|always|never: our own product for few rows, instead of BLAS; `converts`
// says that the weight is in another type than it is multiplied in.
bool small_product(int64_t rows, int64_t in, bool converts);

// GAUGE_EXT_BFLOAT16=auto|native|float32: multiply bfloat16 matrices by torch's bfloat16 product,
// or by the float32 one on panels converted as they are needed. By itself a processor that has
// tiles for bfloat16 (AMX) gets the first, any other the second: without instructions for it
// torch's product is many times slower, and with AVX-512's alone half as fast as float32.
bool native_bfloat16();

}  // namespace gauge_ext
