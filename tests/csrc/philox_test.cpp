// The generator against the known-answer vectors of the Random123 distribution, and the two forms
// of the dropout mask, whole rows by vector registers and one element, against each other.

#include "math/dropout.h"

#include <array>
#include <vector>

#include "check_main.h"
#include "ops/cpu/low_rank.h"

namespace {

std::array<uint32_t, 4> draw(std::array<uint32_t, 4> counter, uint64_t key) {
  uint32_t words[4] = {counter[0], counter[1], counter[2], counter[3]};
  gauge_ext::philox4x32(words, gauge_ext::PhiloxKey{key});
  return {words[0], words[1], words[2], words[3]};
}

TEST_CASE("philox gives the published words") {
  using Words = std::array<uint32_t, 4>;
  CHECK(draw({0, 0, 0, 0}, 0) == Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  CHECK(draw({~0u, ~0u, ~0u, ~0u}, ~0ull) == Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  CHECK(draw({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0x299f31d0a4093822ull) ==
        Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

template <typename scalar_t>
void check_rows() {
  using acc_t = typename gauge_ext::AccOf<scalar_t>::type;
  const auto& kernels = gauge_ext::low_rank_kernels<scalar_t>();
  const auto dropout = gauge_ext::Dropout::make(0.3, 0x0123456789abcdefull);
  const int64_t rows = 3, columns = 300;
  for (const int64_t first_row : {int64_t(0), int64_t(5), (int64_t(1) << 32) - 1}) {
    std::vector<acc_t> mask(rows * columns);
    kernels.mask(dropout, first_row, rows, columns, mask.data());
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t c = 0; c < columns; ++c) {
        const double element = gauge_ext::dropout_element(dropout, first_row + i, c);
        REQUIRE(mask[i * columns + c] == static_cast<acc_t>(element));
      }
    }
  }
}

TEST_CASE("rows of the mask, a register at a time, equal its elements") {
  check_rows<float>();
  check_rows<double>();
}

TEST_CASE("dropout rounds p and keeps the expectation") {
  const auto half = gauge_ext::Dropout::make(0.5, 1);
  CHECK(half.threshold == 32768);
  CHECK(half.scale == 2.0);
  const auto tenth = gauge_ext::Dropout::make(0.1, 1);
  CHECK_CLOSE(tenth.scale * (65536 - tenth.threshold) / 65536, 1.0, 1e-15);
  CHECK(gauge_ext::Dropout::make(1.0, 1).scale == 0.0);
  CHECK(!gauge_ext::Dropout::make(0.0, 1).active());
}

}  // namespace
