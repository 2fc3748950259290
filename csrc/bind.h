// How an op's file adds its function to the Python module: WAVFLOW_BIND(m) { m.def(...); }
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "check.h"

namespace wavflow {

using Binder = void (*)(pybind11::module_&);
bool register_binder(Binder binder);

template <class T> T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

}  // namespace wavflow

#define WAVFLOW_BIND(m)                                                       \
  static void bind_op(pybind11::module_& m);                                  \
  static const bool bound = ::wavflow::register_binder(&bind_op);             \
  static void bind_op(pybind11::module_& m)
