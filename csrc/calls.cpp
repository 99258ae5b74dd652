// The Python module gauge_ext._calls: ops called from Python at less cost than by torch.ops.
//
// torch.ops.gauge_ext.<op> goes through a method in Python, a parser of any schema and a stack of
// boxed values, which together take as long as a small layer's arithmetic. A function here takes
// the arguments of one op apart and calls the very same op by the dispatcher, so that autograd,
// autocast, torch.func, modes and profilers see what they see by the other way. Anything out of the
// ordinary is not its business: it returns NotImplemented, and gauge_ext/ops/<op>.py goes on.
//
// The only file that is linked to torch's Python side. It needs _ops for nothing but the ops, which
// it looks up at the first call.

#include <torch/csrc/autograd/python_variable.h>

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>

#include "ops/formula.h"
#include "ops/lora_linear.h"

namespace gauge_ext {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Other threads run Python meanwhile.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;
  ~WithoutGil() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

// A Tensor or Parameter: a subclass may have its own way with an op (__torch_function__).
bool is_plain(PyObject* object) {
  return THPVariable_CheckExact(object);
}

bool is_plain_or_none(PyObject* object) {
  return object == Py_None || is_plain(object);
}

// A copy each, as another thread may exchange what a Python object stands for (swap_tensors).
Tensor tensor_of(PyObject* object) {
  return THPVariable_Unpack(object);
}

OptionalTensor optional_of(PyObject* object) {
  return object == Py_None ? std::nullopt : OptionalTensor(tensor_of(object));
}

// Whether somebody listens who hears only of torch.ops or of torch's own operators: a
// TorchFunctionMode, or torch.jit.trace, for which the op is written down as its formula.
bool is_overheard() {
  return at::impl::torch_function_mode_enabled() || at::tracer::impl::is_dispatch_enabled();
}

// y, or NotImplemented; given: x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed
PyObject* lora_linear(PyObject* const* given, Py_ssize_t count) {
  TORCH_CHECK_TYPE(count == 8, "lora_linear takes 8 arguments, got ", count);
  const bool plain = is_plain(given[0]) && is_plain(given[1]) && is_plain_or_none(given[2]) &&
                     is_plain(given[3]) && is_plain(given[4]) && PyFloat_CheckExact(given[5]) &&
                     PyFloat_CheckExact(given[6]) && is_plain_or_none(given[7]);
  if (!plain || is_overheard()) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  static const auto op = find<LoraLinearSchema>("gauge_ext::lora_linear");
  static const bool cuda_kernels = op.hasKernelForDispatchKey(c10::DispatchKey::CUDA);
  const Tensor x = tensor_of(given[0]);
  if (!(x.is_cpu() || x.is_meta() || (x.is_cuda() && cuda_kernels))) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  const Tensor weight = tensor_of(given[1]);
  const OptionalTensor bias = optional_of(given[2]);
  const Tensor lora_A = tensor_of(given[3]), lora_B = tensor_of(given[4]);
  const double scaling = PyFloat_AS_DOUBLE(given[5]), dropout_p = PyFloat_AS_DOUBLE(given[6]);
  const OptionalTensor seed = optional_of(given[7]);
  Tensor y;
  {
    const WithoutGil others_run;
    y = op.call(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed);
  }
  return THPVariable_Wrap(std::move(y));
}

// A function as Python calls it: what it throws becomes the exception that torch.ops makes of it.
template <PyObject* (*function)(PyObject* const*, Py_ssize_t)>
PyObject* entry(PyObject*, PyObject* const* given, Py_ssize_t count) {
  try {
    return function(given, count);
  } catch (...) {
    torch::translate_exception_to_python(std::current_exception());
    return nullptr;
  }
}

PyMethodDef functions[] = {
    {"lora_linear",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&entry<&lora_linear>)),
     METH_FASTCALL,
     "torch.ops.gauge_ext.lora_linear with all of its arguments, by position; NotImplemented where "
     "they are not plain tensors on a device with kernels, or where an op call is overheard."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    "_calls",
    "Ops of gauge_ext called at less cost than by torch.ops.",
    -1,
    functions,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace
}  // namespace gauge_ext

PyMODINIT_FUNC PyInit__calls() {
  return PyModule_Create(&gauge_ext::module);
}
