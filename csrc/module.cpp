// The Python module wavflow_kernels._C. Ops bind themselves (bind.h); this file adds what is common.
#include "bind.h"

#include <pybind11/pybind11.h>

#ifdef WAVFLOW_CUDA
#include "cuda/launch.h"
#endif

namespace py = pybind11;

namespace wavflow {

static py::handle object(Value value) {
  return reinterpret_cast<PyObject*>(const_cast<struct Object*>(value));
}
static Value value(py::handle object) { return reinterpret_cast<Value>(object.ptr()); }

static std::vector<Binder>& binders() {
  static std::vector<Binder> list;
  return list;
}
bool register_binder(Binder binder) {
  binders().push_back(binder);
  return true;
}

template <class T>
static T cast(Value from) {
  return object(from).cast<T>();
}
void read(Value from, bool& to) { to = cast<bool>(from); }
void read(Value from, int& to) { to = cast<int>(from); }
void read(Value from, int64_t& to) { to = cast<int64_t>(from); }
void read(Value from, uintptr_t& to) { to = cast<uintptr_t>(from); }
void read(Value from, double& to) { to = cast<double>(from); }
void read(Value from, std::string& to) { to = cast<std::string>(from); }

std::vector<Value> items(Value from, int64_t count) {
  if (!py::isinstance<py::list>(object(from)) && !py::isinstance<py::tuple>(object(from)))
    throw py::type_error("got " + std::string(py::repr(object(from))) + ", wanted a list or tuple");
  std::vector<Value> found;
  for (const py::handle item : object(from)) found.push_back(value(item));
  if (count >= 0 && int64_t(found.size()) != count)
    throw py::type_error("got " + std::to_string(found.size()) + " items, wanted " +
                         std::to_string(count));
  return found;
}

Unlocked::Unlocked() : state_(PyEval_SaveThread()) {}
Unlocked::~Unlocked() { PyEval_RestoreThread(static_cast<PyThreadState*>(state_)); }

static py::module_& in(void* module) { return *static_cast<py::module_*>(module); }

void Module::set(const char* name, int64_t value) { in(module_).attr(name) = value; }
void Module::set(const char* name, const char* value) { in(module_).attr(name) = value; }

void Module::add(const char* name, Call call, void (*function)(), size_t arguments) {
  in(module_).def(name, [=](const py::args& given) -> py::object {
    if (given.size() != arguments)
      throw py::type_error(std::string(name) + ": got " + std::to_string(given.size()) +
                           " arguments, wanted " + std::to_string(arguments));
    std::vector<Value> values;
    values.reserve(arguments);
    for (const py::handle argument : given) values.push_back(value(argument));
    const std::optional<std::string> said = call(function, values.data());
    return said ? py::object(py::str(*said)) : py::none();
  });
}

}  // namespace wavflow

PYBIND11_MODULE(_C, module) {
  using namespace wavflow;
  module.doc() = "Compiled kernels of wavflow_kernels: raw pointers and sizes in, nothing of torch.";
#ifdef _OPENMP
  module.attr("openmp") = true;
#else
  module.attr("openmp") = false;
#endif
  Module m(&module);
#ifdef WAVFLOW_CUDA
  m.set("cuda_architectures", WAVFLOW_CUDA_ARCHITECTURES);
  m.def("cuda_probe", [] { return cuda_probe(); });
#else
  m.set("cuda_architectures", "");
#endif
  for (Binder bind : binders()) bind(m);
}
