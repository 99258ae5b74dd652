#pragma once

// What the formulas of the LoRA ops share: autograd, autocast, and the same in plain ATen.

#include <utility>

#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/matmul.h>

namespace gauge_ext {

template <typename Schema>
c10::TypedOperatorHandle<Schema> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Schema>();
}

// (N, columns), of whatever batch dimensions; sizes may be symbolic.
inline at::Tensor flatten(const at::Tensor& tensor, const c10::SymInt& columns) {
  return tensor.reshape_symint({-1, columns});
}

// The gradients of a base that is not frozen, as it is as a rule: those of a linear layer.
inline at::Tensor grad_weight(const at::Tensor& grad,
                              const at::Tensor& x,
                              const at::Tensor& weight) {
  return at::matmul(flatten(grad, weight.sym_size(0)).t(), flatten(x, weight.sym_size(1)));
}
inline at::Tensor grad_bias(const at::Tensor& grad, const at::Tensor& weight) {
  return flatten(grad, weight.sym_size(0)).sum(0);
}

// Whether the tensor is a dual number of forward mode or wrapped by torch.func's grad or jvp.
inline bool is_transformed(const at::Tensor& tensor) {
  return tensor._fw_grad(/*level=*/0).defined() ||
         tensor.key_set().has(c10::DispatchKey::FuncTorchGradWrapper);
}

// Under autocast the base computes as nn.Linear does, in the lower precision; the adapter keeps its
// own dtype, which costs nothing, since its products are accumulated in float32 anyway. body(cast)
// runs without autocast; cast(tensor or optional) is for what belongs to the base.
class Autocast {
 public:
  explicit Autocast(const at::Tensor& x)
      : device_(x.device().type()),
        off_(at::autocast::get_autocast_dispatch_key_from_device_type(device_)),
        dtype_(at::autocast::get_autocast_dtype(device_)) {}

  at::Tensor operator()(const at::Tensor& tensor) const {
    return at::autocast::cached_cast(dtype_, tensor, device_);
  }
  std::optional<at::Tensor> operator()(const std::optional<at::Tensor>& tensor) const {
    return tensor.has_value() ? std::optional((*this)(*tensor)) : std::nullopt;
  }

 private:
  c10::DeviceType device_;
  c10::impl::ExcludeDispatchKeyGuard off_;
  at::ScalarType dtype_;
};

}  // namespace gauge_ext
