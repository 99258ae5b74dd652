// The Python module gauge_ext._C: it tells how the extension was built, and has what works without
// torch.
//
// It is not linked to torch, so it loads whatever torch is installed, and where none is imported;
// gauge_ext/_load.py compares that torch with the one named here before it loads the ops, whose
// symbols depend on it.

#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "blocks/bindings.h"

namespace gauge_ext {
namespace {

namespace py = pybind11;

py::tuple words(const char* text) {
  std::istringstream stream{text};
  py::list found;
  for (std::string word; stream >> word;) {
    found.append(word);
  }
  return py::tuple(found);
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = GAUGE_EXT_COMPILER;
  info["cxx_standard"] = __cplusplus;
  info["build_type"] = GAUGE_EXT_BUILD_TYPE;
  info["flags"] = words(GAUGE_EXT_FLAGS);
  info["kernel_flags"] = words(GAUGE_EXT_KERNEL_FLAGS);
  info["sanitizers"] = words(GAUGE_EXT_SANITIZERS);
  info["capabilities"] = words(GAUGE_EXT_CAPABILITIES);
  info["openmp"] = _OPENMP;
  info["torch"] = GAUGE_EXT_TORCH_VERSION;
  info["torch_cuda"] = GAUGE_EXT_TORCH_CUDA;
  info["nvcc"] = GAUGE_EXT_NVCC_VERSION;
  info["cuda_architectures"] = words(GAUGE_EXT_CUDA_ARCHITECTURES);
  info["cuda_reason"] = GAUGE_EXT_CUDA_REASON;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "How the compiled part of gauge_ext was built, and what of it needs no torch.";
  m.def("build_info", &build_info,
        "Returns compiler, flags, instruction sets and the torch version built against.");
  bind_blocks(m);
}

}  // namespace gauge_ext
