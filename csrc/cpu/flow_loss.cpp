#include "../flow_loss.h"

#include <vector>

#include "../bind.h"
#include "parallel.h"

namespace wavflow {

template <class T>
static void run(const FlowLossArgs& a) {
  using A = compute_t<T>;
  const int64_t per_row = blocks(a.count);
  std::vector<double> partials(a.backward ? 0 : a.batch * per_row);
  double* partial = partials.data();
  parallel_for<T>(a.batch * per_row, a.target.threads, [=](int64_t i) WF_BODY {
    const int64_t b = i / per_row, begin = i % per_row * kBlock, at = b * a.count + begin;
    const int64_t n = a.count - begin < kBlock ? a.count - begin : kBlock;
    const auto item = flow_loss_item(a.kind, static_cast<const A*>(a.t)[b], A(a.sigma_min));
    const T* __restrict pred = static_cast<const T*>(a.pred) + at;
    const A* __restrict x_1 = static_cast<const A*>(a.x_1) + at;
    const A* __restrict other = a.other ? static_cast<const A*>(a.other) + at : nullptr;
    if (!a.backward) {
      // The residual is squared in A, summed in double.
      auto square = [=](A o, int64_t j) WF_BODY {
        const A r = item.w * flow_loss_residual(item, A(load(pred[j])), x_1[j], o);
        return double(r) * double(r);
      };
      partial[i] = other ? lane_sum<double>(n, [=](int64_t j) WF_BODY { return square(other[j], j); })
                         : lane_sum<double>(n, [=](int64_t j) WF_BODY { return square(A(0), j); });
      return;
    }
    const A slope = A(2) * static_cast<const A*>(a.grad)[b] / A(a.count) * item.w * item.w;
    T* __restrict d_pred = static_cast<T*>(a.out) + at;
    A* __restrict d_residual = a.out_residual ? static_cast<A*>(a.out_residual) + at : nullptr;
    for (int64_t j = 0; j < n; ++j) {
      const A o = other ? other[j] : A(0);
      const A d = slope * flow_loss_residual(item, A(load(pred[j])), x_1[j], o);
      d_pred[j] = store<T>(item.a * d);
      if (d_residual) d_residual[j] = d;
    }
  });
  if (a.backward) return;
  for (int64_t b = 0; b < a.batch; ++b) {
    double sum = 0;
    for (int64_t i = b * per_row; i < (b + 1) * per_row; ++i) sum += partials[i];
    static_cast<A*>(a.out)[b] = A(sum / double(a.count));
  }
}

void flow_loss_cpu(const FlowLossArgs& a) {
  dispatch("flow_loss", a.dtype, [&](auto type) { run<typename decltype(type)::type>(a); });
}

WAVFLOW_BIND(m) {
  m.def("flow_loss", [](Target target, int dtype, int kind, bool backward, uintptr_t pred,
                        uintptr_t x_1, uintptr_t other, uintptr_t t, uintptr_t grad, uintptr_t out,
                        uintptr_t out_residual, uintptr_t partials, int64_t batch, int64_t count,
                        double sigma_min) {
    FlowLossArgs args{target, DType(dtype), kind, backward, pointer<void>(pred),
                      pointer<void>(x_1), pointer<void>(other), pointer<void>(t),
                      pointer<void>(grad), pointer<void>(out), pointer<void>(out_residual),
                      pointer<void>(partials), batch, count, sigma_min};
#ifdef WAVFLOW_CUDA
    if (target.device >= 0) return flow_loss_cuda(args);
#endif
    flow_loss_cpu(args);
  });
}

}  // namespace wavflow
