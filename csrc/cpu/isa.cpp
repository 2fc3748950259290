// The instruction sets of this processor, the one that the kernels use, and whether fork() made this process.
#include <algorithm>
#include <stdexcept>
#include <string>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "../bind.h"
#include "parallel.h"

namespace wavflow {

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

WAVFLOW_BIND(m) {
#if defined(__unix__) || defined(__APPLE__)
  pthread_atfork(nullptr, nullptr, [] { forked_child = true; });
#endif
  m.def("use_isa", [](std::string wanted) { return std::string(use_isa(wanted)); });
}

}  // namespace wavflow
