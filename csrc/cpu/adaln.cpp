#include "../adaln.h"

#include "../bind.h"

namespace wavflow {

WAVFLOW_BIND(m) {
  m.structure("RowTensor");
  m.structure("TokenRows");
  m.def("adaln", [](Target target, int dtype, uintptr_t x, RowTensor shift, RowTensor scale,
                    TokenRows rows, uintptr_t out, int64_t batch, int64_t tokens, int64_t channels,
                    double eps) {
    AdalnArgs a{};
    a.op = "adaln", a.target = target, a.dtype = DType(dtype);
    a.x = x, a.shift = shift, a.scale = scale, a.rows = rows, a.out = out;
    a.batch = batch, a.tokens = tokens, a.channels = channels, a.eps = eps;
    dispatch(a.op, a.dtype, [&](auto type) { adaln_forward<false, typename decltype(type)::type>(a); });
  });
  m.def("adaln_backward", [](Target target, int dtype, uintptr_t grad, uintptr_t x, RowTensor scale,
                             TokenRows rows, uintptr_t d_x, uintptr_t d_shift, uintptr_t d_scale,
                             int64_t batch, int64_t tokens, int64_t channels, double eps) {
    AdalnArgs a{};
    a.op = "adaln", a.target = target, a.dtype = DType(dtype);
    a.grad = grad, a.x = x, a.scale = scale, a.rows = rows;
    a.d_x = d_x, a.d_shift = d_shift, a.d_scale = d_scale;
    a.batch = batch, a.tokens = tokens, a.channels = channels, a.eps = eps;
    dispatch(a.op, a.dtype, [&](auto type) { adaln_backward<false, typename decltype(type)::type>(a); });
  });
}

}  // namespace wavflow
