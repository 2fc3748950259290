// How an op's file adds its functions to the Python module: WAVFLOW_BIND(m) { m.def("name", [](...) {}); }
//
// A function takes integers, reals, bools, arrays and vectors of them and structs that read() knows,
// which Python gives as tuples. It returns nothing or a string and runs without Python's lock. This is
// written on Python's C API: the header of a binding library costs more to compile than most kernels.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <array>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "check.h"

namespace wavflow {

template <class T> T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

// A Python exception is set and on its way.
struct PythonError {};

void read(PyObject* from, bool& to);
void read(PyObject* from, int& to);
void read(PyObject* from, int64_t& to);
void read(PyObject* from, uintptr_t& to);
void read(PyObject* from, double& to);
void read(PyObject* from, std::string& to);

// The items of a list or tuple; throws unless it is one, and of `count` items where that is not negative.
PyObject* const* items(PyObject* from, Py_ssize_t count, Py_ssize_t* found = nullptr);

template <class T, size_t N>
void read(PyObject* from, std::array<T, N>& to) {
  PyObject* const* item = items(from, Py_ssize_t(N));
  for (T& value : to) read(*item++, value);
}
template <class T>
void read(PyObject* from, std::vector<T>& to) {
  Py_ssize_t count = 0;
  PyObject* const* item = items(from, -1, &count);
  to.resize(size_t(count));
  for (T& value : to) read(*item++, value);
}
template <class... Member>
void read_members(PyObject* from, Member&... member) {
  PyObject* const* item = items(from, Py_ssize_t(sizeof...(Member)));
  (read(*item++, member), ...);
}
inline void read(PyObject* from, Target& to) { read_members(from, to.device, to.threads, to.stream); }

// Runs without Python's lock.
class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  ~Unlocked() { PyEval_RestoreThread(state_); }
  Unlocked(const Unlocked&) = delete;

 private:
  PyThreadState* state_;
};

// A function as Python has it: `call` reads the arguments of `function` and calls it.
struct Function {
  PyMethodDef definition;
  void (*function)();
  Py_ssize_t arguments;
};
const Function& called(PyObject* self, Py_ssize_t arguments);  // throws where their number is wrong
PyObject* failed();  // the exception in flight as Python's

template <class R, class... Argument>
PyObject* call(PyObject* self, PyObject* const* given, Py_ssize_t count) {
  try {
    const auto function = reinterpret_cast<R (*)(Argument...)>(called(self, count).function);
    std::tuple<Argument...> arguments;
    std::apply([&](Argument&... argument) { (read(*given++, argument), ...); }, arguments);
    if constexpr (std::is_void_v<R>) {
      const Unlocked unlocked;
      std::apply(function, arguments);
    } else {
      return PyUnicode_FromString(std::string(std::apply(function, arguments)).c_str());
    }
  } catch (...) {
    return failed();
  }
  Py_RETURN_NONE;
}

class Module {
 public:
  explicit Module(PyObject* module) : module_(module) {}

  // A function that is a lambda without captures.
  template <class F> void def(const char* name, F function) { def_pointer(name, +function); }
  // A name for the tuple of a struct's members.
  void structure(const char* name);
  void set(const char* name, PyObject* value);  // takes the reference

 private:
  template <class R, class... Argument>
  void def_pointer(const char* name, R (*function)(Argument...)) {
    add(name, &call<R, Argument...>, reinterpret_cast<void (*)()>(function), sizeof...(Argument));
  }
  void add(const char* name, PyObject* (*call)(PyObject*, PyObject* const*, Py_ssize_t),
           void (*function)(), size_t arguments);

  PyObject* module_;
};

using Binder = void (*)(Module&);
bool register_binder(Binder binder);

}  // namespace wavflow

#define WAVFLOW_BIND(m)                                                       \
  static void bind_op(::wavflow::Module& m);                                  \
  static const bool bound = ::wavflow::register_binder(&bind_op);             \
  static void bind_op(::wavflow::Module& m)
