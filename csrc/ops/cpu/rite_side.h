#pragma once

// LoRA-RITE's step is the same for both factors: a side is one of them with what belongs to it, the
// metric of the other and the turns of both frames, see lora_rite.h.

#include <cstdint>

#include "ops/cpu/factor_panel.h"
#include "ops/cpu/lora_rite.h"

namespace gauge_ext {
namespace {

// One factor and what belongs to it.
template <typename scalar_t>
struct Side {
  using acc_t = typename AccOf<scalar_t>::type;

  FactorVectors<scalar_t> factor;
  FactorVectors<const scalar_t> grad;
  acc_t* avg;
  acc_t* frame;
  double* moment;
  const double* own;    // E of the factor's frame
  const double* other;  // E of its gradient and its step
  double effective;     // times what is stored is the effective factor
  const double* turn;   // of the frame that the moments are in, transposed
  double* own_turn;     // of the factor's own frame, transposed
  const double* rest;   // the damping's share K of the frame of the moments, or null
};

template <typename scalar_t>
Side<scalar_t> side_A(const RiteLayer<scalar_t>& l, const FactorMetric& m, const RiteTurns& t) {
  const auto& f = l.factors;
  return {{f.lora_A, f.rank, f.columns, false},
          {f.grad_A, f.rank, f.columns, false},
          f.avg_A,
          l.frame_A,
          l.moment_A,
          m.e_a,
          m.e_m,
          1.0,
          t.frame_B,
          t.frame_A,
          f.anchor_B ? nullptr : t.rest};
}

template <typename scalar_t>
Side<scalar_t> side_B(const RiteLayer<scalar_t>& l, const FactorMetric& m, const RiteTurns& t) {
  const auto& f = l.factors;
  return {{f.lora_B, f.rank, f.rows, true},
          {f.grad_B, f.rank, f.rows, true},
          f.avg_B,
          l.frame_B,
          l.moment_B,
          m.e_m,
          m.e_a,
          f.scaling,
          t.frame_A,
          t.frame_B,
          f.anchor_B ? t.rest : nullptr};
}

}  // namespace
}  // namespace gauge_ext
