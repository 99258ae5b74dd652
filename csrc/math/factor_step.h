#pragma once

// The numbers of a step of the gauge-invariant optimizers, and what they make of one row or column.

#include <cstdint>

#include "math/host_device.h"

namespace gauge_ext {

// Not std::sqrt, an inline function that object files share (see csrc/README.md)
GAUGE_EXT_HOST_DEVICE double square_root(double x) {
  return __builtin_sqrt(x);
}
GAUGE_EXT_HOST_DEVICE float square_root(float x) {
  return __builtin_sqrtf(x);
}

struct FactorStep {
  double lr;
  double keep;         // √(1 - lr · weight_decay): what is left of each factor
  double grad_scale;   // gradients count times this
  double average;      // β₁ of Adam, or the momentum
  double second;       // β₂ of Adam
  double eps;          // of Adam
  double correction1;  // 1 - β₁ᵗ
  double correction2;  // 1 - β₂ᵗ
  bool nesterov;
};

// An eigenvalue of LoRA-RITE's second moments below this part of the largest counts as this part:
// gradients in float32 have nothing but their rounding there.
constexpr double kSmallestMoment = 1e-10;

// (√v̂ + ε)⁻¹ for the eigenvalue v, and 0 where there was no gradient yet and ε is 0
GAUGE_EXT_HOST_DEVICE double inverse_root(double v, double largest, const FactorStep& step) {
  const double least = kSmallestMoment * (largest > 0 ? largest : 0);
  const double down = square_root((v > least ? v : least) / step.correction2) + step.eps;
  return down > 0 ? 1 / down : 0;
}

enum class StepRule { kScaledGd, kGaugeAdam };

template <typename acc_t>
struct StepCoefficients {
  acc_t average;     // of the old average
  acc_t gradient;    // of the gradient in the new average
  acc_t look_ahead;  // of the gradient beside the average; ScaledGD only
  acc_t scale;       // of gradients, where there is no average
  acc_t second;
  acc_t fresh;  // of the squared norm in the new second moment
  acc_t eps;
  acc_t correction1;
  acc_t correction2;
  acc_t keep;
  acc_t lr;

  // `units` takes a stored gradient to that of the effective factor, `rate` its step back.
  GAUGE_EXT_HOST_DEVICE StepCoefficients(const FactorStep& step,
                                         StepRule rule,
                                         int64_t rank,
                                         double units,
                                         double rate) {
    const double scaled = step.grad_scale * units;
    average = static_cast<acc_t>(step.average);
    gradient =
        static_cast<acc_t>(rule == StepRule::kGaugeAdam ? (1 - step.average) * scaled : scaled);
    look_ahead = static_cast<acc_t>(step.nesterov ? scaled : 0);
    scale = static_cast<acc_t>(scaled);
    second = static_cast<acc_t>(step.second);
    fresh = static_cast<acc_t>((1 - step.second) / static_cast<double>(rank));
    eps = static_cast<acc_t>(step.eps);
    correction1 = static_cast<acc_t>(step.correction1);
    correction2 = static_cast<acc_t>(step.correction2);
    keep = static_cast<acc_t>(step.keep);
    lr = static_cast<acc_t>(step.lr * rate);
  }

  // The factor of a row's or column's step, from the squared norm of its whitened gradient
  GAUGE_EXT_HOST_DEVICE acc_t rate(acc_t norm, acc_t* moment) const {
    *moment = second * *moment + fresh * norm;
    return lr / (correction1 * (square_root(*moment / correction2) + eps));
  }
};

}  // namespace gauge_ext
