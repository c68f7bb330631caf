// fastlm._C for Python: what is not a tensor operation. The operations register themselves when this library loads.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <thread>
#include <vector>

#include "bindings/argmax.h"
#include "bindings/stream.h"
#include "cpu/gemm.h"
#include "cpu/isa.h"

namespace cpu = fastlm::cpu;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T, class Field>
void define_sweep(py::module_& module, const char* name, Field field) {
  module.def(
      name,
      [field](const Array<T>& x) {
        Array<T> y(x.size());
        (cpu::kernels<T>().math->*field)(x.data(), y.mutable_data(), x.size());
        return y;
      },
      py::arg("x").noconvert(), "The current ISA's function over a 1-D float32 or float64 array.");
}

template <class T>
void define_sweeps(py::module_& module) {
  define_sweep<T>(module, "simd_exp", &cpu::MathKernels<T>::exp);
  define_sweep<T>(module, "simd_exp2_nonpositive", &cpu::MathKernels<T>::exp2_nonpositive);
  define_sweep<T>(module, "simd_sigmoid", &cpu::MathKernels<T>::sigmoid);
  define_sweep<T>(module, "simd_tanh", &cpu::MathKernels<T>::tanh);
}

using Peak = double (*cpu::GemmKernels<float>::*)(double seconds);

double together(Peak peak, int threads, double seconds) {
  py::gil_scoped_release release;
  std::vector<double> rates(threads);
  std::vector<std::thread> pool;
  for (double& rate : rates)
    pool.emplace_back([&rate, peak, seconds] { rate = (cpu::kernels<float>().gemm->*peak)(seconds); });
  for (auto& thread : pool) thread.join();
  double sum = 0;
  for (double rate : rates) sum += rate;
  return sum;
}

void define_peak(py::module_& module, const char* name, Peak peak, const char* doc) {
  module.def(
      name, [peak](int threads, double seconds) { return together(peak, threads, seconds); }, py::arg("threads"),
      py::arg("seconds"), doc);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Introspection of fastlm's compiled kernels, and those that keep packed weights: streams, argmax.";
  fastlm::bindings::define_stream(module);
  fastlm::bindings::define_argmax<float>(module, "ArgmaxFloat32");
  fastlm::bindings::define_argmax<double>(module, "ArgmaxFloat64");
  module.def("cpu_isa", &cpu::isa, "Name of the instruction set in use.");
  module.def("cpu_isas", &cpu::usable_isas, "Names of those usable on this machine, plainest first.");
  module.def("set_cpu_isa", &cpu::set_isa, py::arg("name"), "Uses another instruction set from now on.");
  module.def("product_is_faster", &cpu::product_is_faster, py::arg("m"), py::arg("n"), py::arg("k"),
             py::arg("transpose_a"), py::arg("transpose_b"),
             "Whether a product of float32 (m, k) and (k, n) takes less time than MKL's.");
  module.def("build_info", [] {
    py::dict info;
    info["torch"] = FASTLM_TORCH_VERSION;
    info["compiler"] = __VERSION__;
    info["isas"] = cpu::built_isas();
    return info;
  });
  define_peak(
      module, "fma_peak", &cpu::GemmKernels<float>::fma_peak,
      "Rate of fused multiply-adds in registers, float32, of `threads` threads together over `seconds`; GFLOP/s.");
  define_peak(module, "tile_peak", &cpu::GemmKernels<float>::tile_peak,
              "The same of the product's innermost tile, with its operands in L1.");
  define_sweeps<float>(module);
  define_sweeps<double>(module);
}
