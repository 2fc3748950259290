#include "../adaln.h"

#include "../bind.h"

namespace wavflow {

template <bool kGated>
static void forward(const AdalnArgs& a) {
  dispatch(a.op, a.dtype, [&](auto type) { adaln_forward<kGated, typename decltype(type)::type>(a); });
}
template <bool kGated>
static void backward(const AdalnArgs& a) {
  dispatch(a.op, a.dtype, [&](auto type) { adaln_backward<kGated, typename decltype(type)::type>(a); });
}

WAVFLOW_BIND(m) {
  m.def("adaln", [](Target target, int dtype, uintptr_t x, RowTensor shift, RowTensor scale,
                    TokenRows rows, uintptr_t out, int64_t batch, int64_t tokens, int64_t channels,
                    double eps) {
    AdalnArgs a{};
    a.op = "adaln", a.target = target, a.dtype = DType(dtype);
    a.x = x, a.shift = shift, a.scale = scale, a.rows = rows, a.out = out;
    a.batch = batch, a.tokens = tokens, a.channels = channels, a.eps = eps;
    forward<false>(a);
  });
  m.def("adaln_backward", [](Target target, int dtype, uintptr_t grad, uintptr_t x, RowTensor scale,
                             TokenRows rows, uintptr_t d_x, uintptr_t d_shift, uintptr_t d_scale,
                             int64_t batch, int64_t tokens, int64_t channels, double eps) {
    AdalnArgs a{};
    a.op = "adaln", a.target = target, a.dtype = DType(dtype);
    a.grad = grad, a.x = x, a.scale = scale, a.rows = rows;
    a.d_x = d_x, a.d_shift = d_shift, a.d_scale = d_scale;
    a.batch = batch, a.tokens = tokens, a.channels = channels, a.eps = eps;
    backward<false>(a);
  });
  m.def("gated_residual_adaln", [](Target target, int dtype, uintptr_t x, uintptr_t y,
                                   RowTensor gate, TokenRows gate_rows, RowTensor shift,
                                   RowTensor scale, TokenRows rows, uintptr_t sum, uintptr_t out,
                                   int64_t batch, int64_t tokens, int64_t channels, double eps) {
    AdalnArgs a{};
    a.op = "gated_residual_adaln", a.target = target, a.dtype = DType(dtype);
    a.x = x, a.y = y, a.gate = gate, a.gate_rows = gate_rows;
    a.shift = shift, a.scale = scale, a.rows = rows, a.sum = sum, a.out = out;
    a.batch = batch, a.tokens = tokens, a.channels = channels, a.eps = eps;
    forward<true>(a);
  });
  m.def("gated_residual_adaln_backward", [](Target target, int dtype, uintptr_t grad_sum,
          uintptr_t grad, uintptr_t x, uintptr_t y, RowTensor gate, TokenRows gate_rows,
          RowTensor scale, TokenRows rows, uintptr_t d_x, uintptr_t d_y, uintptr_t d_gate,
          uintptr_t d_shift, uintptr_t d_scale, int64_t batch, int64_t tokens, int64_t channels,
          double eps) {
    AdalnArgs a{};
    a.op = "gated_residual_adaln", a.target = target, a.dtype = DType(dtype);
    a.grad_sum = grad_sum, a.grad = grad, a.x = x, a.y = y;
    a.gate = gate, a.gate_rows = gate_rows, a.scale = scale, a.rows = rows;
    a.d_x = d_x, a.d_y = d_y, a.d_gate = d_gate, a.d_shift = d_shift, a.d_scale = d_scale;
    a.batch = batch, a.tokens = tokens, a.channels = channels, a.eps = eps;
    backward<true>(a);
  });
}

}  // namespace wavflow
