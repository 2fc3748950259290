// The Python module wavflow_kernels._C. Ops bind themselves (bind.h); this file adds what is common.
#include "bind.h"

#include <algorithm>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "cpu/parallel.h"
#ifdef WAVFLOW_CUDA
#include "cuda/launch.h"
#endif

namespace wavflow {

static std::vector<Binder>& binders() {
  static std::vector<Binder> list;
  return list;
}
bool register_binder(Binder binder) {
  binders().push_back(binder);
  return true;
}

static bool forked_child = false;
bool in_forked_child() { return forked_child; }

// In the order of their instructions; the last is Isa::avx512 with AVX-512-bf16.
static const char* const isa_names[] = {"default", "avx2", "avx512", "avx512_bf16"};
static constexpr int isa_count = 4;

static int best_isa() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2"))
    return 1;
#endif
  return 0;
}

static int current_isa = best_isa();
Isa isa() { return Isa(std::min(current_isa, int(Isa::avx512))); }
bool has_avx512_bf16() { return current_isa == 3; }

// Chooses an instruction set by name; "" the best one. Returns the name of the one in use.
static const char* use_isa(const std::string& wanted) {
  const int best = best_isa();
  int chosen = wanted.empty() ? best : 0;
  while (!wanted.empty() && chosen < isa_count && wanted != isa_names[chosen]) ++chosen;
  if (chosen == isa_count)
    throw std::invalid_argument("WAVFLOW_CPU_ISA is '" + wanted +
                                "', wanted one of avx512_bf16, avx512, avx2, default");
  if (chosen > best)
    throw std::invalid_argument("WAVFLOW_CPU_ISA is '" + wanted +
                                "', which this processor does not have; its best is '" +
                                isa_names[best] + "'");
  current_isa = chosen;
  return isa_names[chosen];
}

}  // namespace wavflow

PYBIND11_MODULE(_C, m) {
  using namespace wavflow;
  m.doc() = "Compiled kernels of wavflow_kernels: raw pointers and sizes in, nothing of torch.";
#if defined(__unix__) || defined(__APPLE__)
  pthread_atfork(nullptr, nullptr, [] { forked_child = true; });
#endif
  m.def("use_isa", &use_isa, "Chooses avx512_bf16, avx512, avx2 or default; '' the best. Returns its name.");
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
#ifdef WAVFLOW_CUDA
  m.attr("cuda_architectures") = WAVFLOW_CUDA_ARCHITECTURES;
  m.def("cuda_probe", &cuda_probe, "'' where a CUDA driver and device answer, else the reason.");
#else
  m.attr("cuda_architectures") = "";
#endif
  pybind11::class_<Target>(m, "Target").def(pybind11::init<int, int, uintptr_t>());
  for (Binder bind : binders()) bind(m);
}
