#include "ops/cpu/paths.h"

#include <cstdlib>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <c10/util/Exception.h>

namespace gauge_ext {
namespace {

Choice read(const char* variable, const char* always, const char* never) {
  const char* set = std::getenv(variable);
  const std::string value = set == nullptr ? "auto" : set;
  if (value == "auto" || value.empty()) {
    return Choice::kAuto;
  }
  TORCH_CHECK(value == always || value == never, variable, " must be auto, ", always, " or ", never,
              ", got ", value);
  return value == always ? Choice::kAlways : Choice::kNever;
}

struct Choices {
  Choice merged = read("GAUGE_EXT_MERGED", "always", "never");
  Choice small = read("GAUGE_EXT_SMALL", "always", "never");
  Choice native = read("GAUGE_EXT_BFLOAT16", "native", "float32");
};

const Choices& choices() {
  static const Choices all;
  return all;
}

bool has_amx_bfloat16() {
#if defined(__x86_64__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kAmxBf16 = 1u << 22;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kAmxBf16) != 0;
#else
  return true;  // what torch does with bfloat16 on other processors is its own best
#endif
}

}  // namespace

bool merged_forward(int64_t rows, int64_t in, int64_t out, bool wants_hidden) {
  if (const Choice forced = choices().merged; forced != Choice::kAuto) {
    return forced == Choice::kAlways;
  }
  // Forming W' costs about r·in·out multiply-adds and a pass over W. What it saves is one product
  // of r·rows·out, and, where x Aᵀ is not wanted for itself, another of r·rows·in.
  const int64_t saved = rows * (wants_hidden ? out : in + out);
  return saved >= 2 * in * out;
}

bool merged_backward(int64_t rows, int64_t in, int64_t out) {
  if (const Choice forced = choices().merged; forced != Choice::kAuto) {
    return forced == Choice::kAlways;
  }
  return rows >= 2 * out && in > 0;
}

bool small_product(int64_t rows, int64_t in, bool converts) {
  if (const Choice forced = choices().small; forced != Choice::kAuto) {
    return forced == Choice::kAlways;
  }
  // Measured. Ours adds up the lanes of a register for each element of y, which short rows are not
  // worth; but BLAS would have to get W converted.
  return rows <= (in < 768 && !converts ? 16 : 32);
}

bool native_bfloat16() {
  static const bool native = [] {
    const Choice forced = choices().native;
    return forced == Choice::kAuto ? has_amx_bfloat16() : forced == Choice::kAlways;
  }();
  return native;
}

}  // namespace gauge_ext
