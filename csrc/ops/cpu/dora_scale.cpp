#include "ops/dora_scale.h"

#include <tuple>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "ops/cpu/pieces.h"
#include "ops/cpu/scale.h"
#include "ops/rows.h"

namespace gauge_ext {
namespace {

using at::Tensor;

constexpr const char* kAdvice = "; convert the model, for example with model.float()";

Tensor forward(const Tensor& y, const Tensor& gain, const std::optional<Tensor>& bias) {
  const auto n = check_dora_scale(y, gain, bias);
  const Tensor z = at::empty(y.sizes(), y.options());
  dispatch_dtype(y, "y", kAdvice, [&](auto tag) {
    using scalar_t = decltype(tag);
    using acc_t = typename AccOf<scalar_t>::type;
    const auto wide = y.options().dtype(acc_dtype<acc_t>());
    const Tensor rows = rows_of(y, n.rows, n.out_features);
    const Tensor factor = gain.to(acc_dtype<acc_t>()).contiguous();
    const Tensor shift = bias.has_value() ? bias->to(acc_dtype<acc_t>()).contiguous()
                                          : at::zeros({n.out_features}, wide);
    Pieces(n.rows, n.out_features).run([&](int64_t, int64_t first, int64_t count) {
      const int64_t offset = first * n.out_features;
      scale_kernels<scalar_t>().scale(data_of<scalar_t>(rows) + offset, count, n.out_features,
                                      data_of<acc_t>(factor), data_of<acc_t>(shift),
                                      mutable_data_of<scalar_t>(z) + offset);
    });
  });
  return z;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad,
                                    const Tensor& y,
                                    const Tensor& gain,
                                    bool needs_y,
                                    bool needs_gain) {
  const auto n = check_dora_scale(y, gain, std::nullopt);
  TORCH_CHECK(grad.sizes() == y.sizes() && grad.scalar_type() == y.scalar_type(),
              "grad must have y's shape and dtype, ", y.sizes(), " and ", y.scalar_type(), ", got ",
              grad.sizes(), " and ", grad.scalar_type());
  const Tensor grad_y = needs_y ? at::empty(y.sizes(), y.options()) : at::empty({0}, y.options());
  Tensor grad_gain = at::empty({0}, gain.options());
  if (!needs_y && !needs_gain) {
    return {grad_y, grad_gain};
  }
  dispatch_dtype(y, "y", kAdvice, [&](auto tag) {
    using scalar_t = decltype(tag);
    using acc_t = typename AccOf<scalar_t>::type;
    const Tensor grads = rows_of(grad, n.rows, n.out_features);
    const Tensor rows = rows_of(y, n.rows, n.out_features);
    const Tensor factor = gain.to(acc_dtype<acc_t>()).contiguous();
    const Pieces pieces(n.rows, n.out_features);
    // For each piece of rows its part of the gradient of the gain
    const Tensor sums =
        at::zeros({needs_gain ? std::max<int64_t>(pieces.count, 1) : 0, n.out_features},
                  y.options().dtype(acc_dtype<acc_t>()));
    pieces.run([&](int64_t piece, int64_t first, int64_t count) {
      const int64_t offset = first * n.out_features;
      scale_kernels<scalar_t>().scale_backward(
          data_of<scalar_t>(grads) + offset, data_of<scalar_t>(rows) + offset, count,
          n.out_features, data_of<acc_t>(factor),
          needs_y ? mutable_data_of<scalar_t>(grad_y) + offset : nullptr,
          needs_gain ? mutable_data_of<acc_t>(sums) + piece * n.out_features : nullptr);
    });
    if (needs_gain) {
      grad_gain = (sums.size(0) == 1 ? sums.squeeze(0) : sums.sum(0)).to(gain.scalar_type());
    }
  });
  return {grad_y, grad_gain};
}

}  // namespace

TORCH_LIBRARY_IMPL(gauge_ext, CPU, m) {
  m.impl("dora_scale", &forward);
  m.impl("dora_scale_backward", &backward);
}

}  // namespace gauge_ext
