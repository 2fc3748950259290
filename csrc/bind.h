// How an op's file adds its functions to the Python module: WAVFLOW_BIND(m) { m.def("name", [](...) {}); }
//
// A function takes integers, reals, bools, arrays and vectors of them and structs that read() knows,
// which Python gives as tuples. It returns nothing or a string; one that returns nothing runs without
// Python's lock. pybind11's header costs more to compile than most kernels: module.cpp alone has it.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "args.h"

namespace wavflow {

template <class T> T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

using Value = const struct Object*;  // a Python object, which somebody else holds

void read(Value from, bool& to);
void read(Value from, int& to);
void read(Value from, int64_t& to);
void read(Value from, uintptr_t& to);
void read(Value from, double& to);
void read(Value from, std::string& to);

// The items of a list or tuple; throws unless it is one, and of `count` items where that is not negative.
std::vector<Value> items(Value from, int64_t count = -1);

template <class T, size_t N>
void read(Value from, std::array<T, N>& to) {
  const std::vector<Value> found = items(from, int64_t(N));
  for (size_t i = 0; i < N; ++i) read(found[i], to[i]);
}
template <class T>
void read(Value from, std::vector<T>& to) {
  const std::vector<Value> found = items(from);
  to.resize(found.size());
  for (size_t i = 0; i < found.size(); ++i) read(found[i], to[i]);
}
template <class... Member>
void read_members(Value from, Member&... member) {
  const std::vector<Value> found = items(from, int64_t(sizeof...(Member)));
  const Value* next = found.data();
  (read(*next++, member), ...);
}
inline void read(Value from, Target& to) { read_members(from, to.device, to.threads, to.stream); }

// Python's lock is not held while it lives.
class Unlocked {
 public:
  Unlocked();
  ~Unlocked();
  Unlocked(const Unlocked&) = delete;

 private:
  void* state_;
};

// Reads the arguments of `function` and calls it; what it returned, if it returns a string.
using Call = std::optional<std::string> (*)(void (*function)(), const Value* given);

template <class R, class... Argument>
std::optional<std::string> call(void (*function)(), const Value* given) {
  std::tuple<Argument...> arguments;
  std::apply([&](Argument&... argument) { (read(*given++, argument), ...); }, arguments);
  const auto run = reinterpret_cast<R (*)(Argument...)>(function);
  if constexpr (std::is_void_v<R>) {
    const Unlocked unlocked;
    std::apply(run, arguments);
    return {};
  } else {
    return std::apply(run, arguments);
  }
}

class Module {
 public:
  explicit Module(void* module) : module_(module) {}

  // A function that is a lambda without captures.
  template <class F> void def(const char* name, F function) { def_pointer(name, +function); }
  void set(const char* name, int64_t value);
  void set(const char* name, const char* value);

 private:
  template <class R, class... Argument>
  void def_pointer(const char* name, R (*function)(Argument...)) {
    add(name, &call<R, Argument...>, reinterpret_cast<void (*)()>(function), sizeof...(Argument));
  }
  void add(const char* name, Call call, void (*function)(), size_t arguments);

  void* module_;
};

using Binder = void (*)(Module&);
bool register_binder(Binder binder);

}  // namespace wavflow

#define WAVFLOW_BIND(m)                                                       \
  static void bind_op(::wavflow::Module& m);                                  \
  static const bool bound = ::wavflow::register_binder(&bind_op);             \
  static void bind_op(::wavflow::Module& m)
