// The Python module wavflow_kernels._C. Ops bind themselves (bind.h); this file adds what is common.
#include "bind.h"

#include <algorithm>
#include <new>
#include <stdexcept>

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

void read(PyObject* from, bool& to) {
  const int truth = PyObject_IsTrue(from);
  if (truth < 0) throw PythonError();
  to = truth != 0;
}
void read(PyObject* from, int64_t& to) {
  to = PyLong_AsLongLong(from);
  if (to == -1 && PyErr_Occurred()) throw PythonError();
}
void read(PyObject* from, int& to) {
  int64_t wide;
  read(from, wide);
  to = int(wide);
  if (to == wide) return;
  PyErr_Format(PyExc_OverflowError, "%R does not fit in 32 bits", from);
  throw PythonError();
}
void read(PyObject* from, uintptr_t& to) {
  to = PyLong_AsSize_t(from);
  if (to == size_t(-1) && PyErr_Occurred()) throw PythonError();
}
void read(PyObject* from, double& to) {
  to = PyFloat_AsDouble(from);
  if (to == -1 && PyErr_Occurred()) throw PythonError();
}
void read(PyObject* from, std::string& to) {
  const char* text = PyUnicode_AsUTF8(from);
  if (!text) throw PythonError();
  to = text;
}

PyObject* const* items(PyObject* from, Py_ssize_t count, Py_ssize_t* found) {
  const bool sequence = PyList_Check(from) || PyTuple_Check(from);
  if (sequence && (count < 0 || PySequence_Fast_GET_SIZE(from) == count)) {
    if (found) *found = PySequence_Fast_GET_SIZE(from);
    return PySequence_Fast_ITEMS(from);
  }
  if (count < 0) PyErr_Format(PyExc_TypeError, "got %R, wanted a list", from);
  else PyErr_Format(PyExc_TypeError, "got %R, wanted a list of %zd items", from, count);
  throw PythonError();
}

const Function& called(PyObject* self, Py_ssize_t arguments) {
  const auto* function = static_cast<const Function*>(PyCapsule_GetPointer(self, nullptr));
  if (!function) throw PythonError();
  if (function->arguments == arguments) return *function;
  PyErr_Format(PyExc_TypeError, "%s: got %zd arguments, wanted %zd", function->definition.ml_name,
               arguments, function->arguments);
  throw PythonError();
}

PyObject* failed() {
  try {
    throw;
  } catch (const PythonError&) {
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

void Module::set(const char* name, PyObject* value) {
  if (!value || PyModule_AddObject(module_, name, value) < 0) throw PythonError();
}

void Module::structure(const char* name) {
  // Called with positional arguments, it returns their tuple.
  const PyCFunction members = [](PyObject*, PyObject* arguments) { return Py_INCREF(arguments), arguments; };
  auto* definition = new PyMethodDef{name, members, METH_VARARGS, nullptr};  // as long as the process
  set(name, PyCFunction_New(definition, nullptr));
}

void Module::add(const char* name, PyObject* (*call)(PyObject*, PyObject* const*, Py_ssize_t),
                 void (*function)(), size_t arguments) {
  const auto method = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call));
  auto* record = new Function{{name, method, METH_FASTCALL, nullptr}, function, Py_ssize_t(arguments)};
  PyObject* self = PyCapsule_New(record, nullptr, nullptr);
  if (!self) throw PythonError();
  set(name, PyCFunction_New(&record->definition, self));
  Py_DECREF(self);
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

static void fill(Module& m) {
  m.structure("Target");
  m.def("use_isa", [](std::string wanted) { return use_isa(wanted); });
#ifdef _OPENMP
  m.set("openmp", PyBool_FromLong(1));
#else
  m.set("openmp", PyBool_FromLong(0));
#endif
#ifdef WAVFLOW_CUDA
  m.set("cuda_architectures", PyUnicode_FromString(WAVFLOW_CUDA_ARCHITECTURES));
  m.def("cuda_probe", [] { return cuda_probe(); });
#else
  m.set("cuda_architectures", PyUnicode_FromString(""));
#endif
  for (Binder bind : binders()) bind(m);
}

}  // namespace wavflow

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C",
      "Compiled kernels of wavflow_kernels: raw pointers and sizes in, nothing of torch.", -1,
      nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (!module) return nullptr;
#if defined(__unix__) || defined(__APPLE__)
  pthread_atfork(nullptr, nullptr, [] { wavflow::forked_child = true; });
#endif
  try {
    wavflow::Module m(module);
    wavflow::fill(m);
  } catch (...) {
    Py_DECREF(module);
    return wavflow::failed();
  }
  return module;
}
