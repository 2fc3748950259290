#include "../ode_step.h"

#include "../bind.h"
#include "parallel.h"

namespace wavflow {

template <class A, class T, int K>
static void run(const OdeStepArgs& a) {
  const int64_t step = *a.index;
  if (step < 0 || step >= a.steps)
    throw std::invalid_argument("ode_step: index is " + std::to_string(step) + ", table has " +
                                std::to_string(a.steps) + " rows");
  const A* row_of_step = static_cast<const A*>(a.table) + step * (2 + K * (K + 1));
  const int64_t per_state = blocks(a.count);
  parallel_for<T>(per_state, a.target.threads, [=](int64_t i) WF_BODY {
    const int64_t begin = i * kBlock, end = begin + kBlock < a.count ? begin + kBlock : a.count;
    A row[2 + K * (K + 1)];
    for (int k = 0; k < 2 + K * (K + 1); ++k) row[k] = row_of_step[k];
    const T* pred = static_cast<const T*>(a.pred);
    const T* uncond = static_cast<const T*>(a.uncond);
    const A* state = static_cast<const A*>(a.state);
    A* out = static_cast<A*>(a.out);
    // `out` is `state` itself or apart from it, so elements are independent either way.
#pragma GCC ivdep
    for (int64_t p = begin; p < end; ++p) {
      A s[K], y[K];
      for (int j = 0; j < K; ++j) s[j] = state[j * a.count + p];
      const A d = A(load(pred[p]));
      ode_step_element<K, A>(row, uncond != nullptr, d, uncond ? A(load(uncond[p])) : A(0), s, y);
      for (int j = 0; j < K; ++j) out[j * a.count + p] = y[j];
    }
  });
  if (a.advance) *a.index = step + 1;
}

void ode_step_cpu(const OdeStepArgs& a) {
  dispatch_ode_step(a, [&](auto state, auto pred, auto slots) {
    run<typename decltype(state)::type, typename decltype(pred)::type, decltype(slots)::value>(a);
  });
}

WAVFLOW_BIND(m) {
  m.def("ode_step", [](Target target, int state_dtype, int pred_dtype, uintptr_t state,
                       uintptr_t out, uintptr_t pred, uintptr_t uncond, uintptr_t table,
                       uintptr_t index, int64_t slots, int64_t count, int64_t steps, bool advance) {
    OdeStepArgs args{target, DType(state_dtype), DType(pred_dtype), pointer<void>(state),
                     pointer<void>(out), pointer<void>(pred), pointer<void>(uncond),
                     pointer<void>(table), pointer<int64_t>(index), slots, count, steps, advance};
#ifdef WAVFLOW_CUDA
    if (target.device >= 0) return ode_step_cuda(args);
#endif
    ode_step_cpu(args);
  });
}

}  // namespace wavflow
