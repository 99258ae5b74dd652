#include "ops/dora_scale.h"

#include <algorithm>
#include <vector>

#include <torch/library.h>

#include "check.h"

namespace gauge_ext {

DoraScaleSizes check_dora_scale(const at::Tensor& y,
                                const at::Tensor& gain,
                                const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(gain.dim() == 1, "gain must have shape [out], got ", gain.sizes());
  const int64_t out_features = gain.size(0);
  TORCH_CHECK(gain.is_floating_point(), "gain must be floating-point, got ", gain.scalar_type());
  TORCH_CHECK(y.dim() >= 1 && y.size(-1) == out_features, "y must have shape [*batch, out] = [*, ",
              out_features, "] to fit gain ", gain.sizes(), ", got ", y.sizes());
  TORCH_CHECK(gain.device() == y.device(), "gain must be on y's device, ", y.device(), ", got ",
              gain.device());
  if (bias.has_value()) {
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out_features, "bias must have shape [out] = [",
                out_features, "], got ", bias->sizes());
    TORCH_CHECK(bias->is_floating_point(), "bias must be floating-point, got ",
                bias->scalar_type());
    TORCH_CHECK(bias->device() == y.device(), "bias must be on y's device, ", y.device(), ", got ",
                bias->device());
  }
  return {y.numel() / std::max<int64_t>(out_features, 1), out_features};
}

TORCH_LIBRARY_FRAGMENT(gauge_ext, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("dora_scale(Tensor y, Tensor gain, Tensor? bias=None) -> Tensor", tags);
  // (grad_y, grad_gain); one that is not wanted comes back with no elements.
  m.def(
      "dora_scale_backward(Tensor grad, Tensor y, Tensor gain, bool needs_y, bool needs_gain) -> "
      "(Tensor, Tensor)",
      tags);
}

}  // namespace gauge_ext
