#include "../lift_patchify.h"

#include <vector>

#include "../bind.h"
#include "parallel.h"

namespace wavflow {

template <class In, class Out>
static void run(const LiftArgs& a) {
  using A = compute_t<In>;
  const A* levels = static_cast<const A*>(a.levels);
  const int64_t per_row = levels ? 0 : blocks(a.samples), out_blocks = blocks(a.kept);
  std::vector<double> sums(a.batch * per_row);
  std::vector<A> peaks(a.batch * per_row);
  std::vector<Lift<A>> lifts(a.batch);
  const In* wave = static_cast<const In*>(a.wave);
  Out* tokens = static_cast<Out*>(a.tokens);
  auto length = [&](int64_t b) { return a.lengths ? a.lengths[b] : a.samples; };

  double* sum_of = sums.data();
  A* peak_of = peaks.data();
  parallel_for<In>(a.batch * per_row, a.target.threads, [=](int64_t i) WF_BODY {
    const int64_t b = i / per_row, begin = i % per_row * kBlock;
    const int64_t n = a.lengths ? a.lengths[b] : a.samples;
    const int64_t count = n - begin < kBlock ? n - begin : kBlock;
    const In* x = wave + b * a.samples + begin;
    sum_of[i] = lane_sum<double>(count, [=](int64_t j) WF_BODY {
      const double v = double(load(x[j]));
      return v * v;
    });
    peak_of[i] = largest_magnitude<A>(count, [=](int64_t j) WF_BODY { return load(x[j]); });
  });

  for (int64_t b = 0; b < a.batch; ++b) {
    if (levels) {
      lifts[b] = lift_of(levels[2 * b], levels[2 * b + 1], A(a.target_rms));
      continue;
    }
    double sum = 0;
    A peak = 0;
    for (int64_t i = b * per_row; i < (b + 1) * per_row; ++i) {
      sum += sums[i];
      peak = maximum(peaks[i], peak);
    }
    lifts[b] = lift_of(A(sum / double(length(b))), peak, A(a.target_rms));
  }

  const Lift<A>* lift_of_item = lifts.data();
  parallel_for<Out>(a.batch * out_blocks, a.target.threads, [=](int64_t i) WF_BODY {
    const int64_t b = i / out_blocks, begin = i % out_blocks * kBlock;
    const int64_t end = begin + kBlock < a.kept ? begin + kBlock : a.kept;
    const int64_t n = a.lengths ? a.lengths[b] : a.samples;
    const int64_t audio_end = n < begin ? begin : n < end ? n : end;
    const In* __restrict x = wave + b * a.samples;
    Out* __restrict y = tokens + b * a.kept;
    const Lift<A> lift = lift_of_item[b];
    const A scale = A(a.audio_scale);
    for (int64_t j = begin; j < audio_end; ++j) y[j] = store<Out>(lift_sample(load(x[j]), lift, scale));
    for (int64_t j = audio_end; j < end; ++j) y[j] = store<Out>(A(0));
  });
}

void lift_patchify_cpu(const LiftArgs& a) {
  dispatch_lift(a, [&](auto in, auto out) {
    run<typename decltype(in)::type, typename decltype(out)::type>(a);
  });
}

WAVFLOW_BIND(m) {
  m.def("lift_patchify", [](Target target, int in, int out, uintptr_t wave, uintptr_t lengths,
                            uintptr_t levels, uintptr_t tokens, uintptr_t partials, int64_t batch,
                            int64_t samples, int64_t kept, double target_rms, double audio_scale) {
    LiftArgs args{target, DType(in), DType(out), pointer<void>(wave), pointer<int64_t>(lengths),
                  pointer<void>(levels), pointer<void>(tokens), pointer<void>(partials), batch,
                  samples, kept, target_rms, audio_scale};
#ifdef WAVFLOW_CUDA
    if (target.device >= 0) return lift_patchify_cuda(args);
#endif
    lift_patchify_cpu(args);
  });
}

}  // namespace wavflow
