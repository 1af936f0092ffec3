// Errors of the native side as the Python types of primitives/errors.py, whichever binding they
// pass through.
#pragma once

#include <torch/csrc/Exceptions.h>

#include <exception>

namespace primitives {

// torch's own bindings ask python_type(); plain pybind11 ones use the translator of
// register_errors().
class PythonError : public torch::PyTorchError {
 public:
  PythonError(PyObject* type, const std::string& what) : torch::PyTorchError(what), type_(type) {}
  PyObject* python_type() override { return type_; }
  bool is_timeout() const;

 private:
  PyObject* type_;
};

// Imports primitives.errors and installs the translator.
void register_errors(pybind11::module_& m);

// The exception in flight as a PythonError: TransportError by its failure, std::invalid_argument as
// ValueError.
std::exception_ptr current_python_error();

// Runs f; its errors leave as Python errors.
template <class F>
auto translated(F&& f) -> decltype(f()) {
  try {
    return f();
  } catch (...) {
    std::rethrow_exception(current_python_error());
  }
}

}  // namespace primitives
