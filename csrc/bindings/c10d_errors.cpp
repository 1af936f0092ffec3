#include "bindings/c10d_errors.hpp"

#include <stdexcept>

#include "transport/errors.hpp"

namespace primitives {
namespace {

struct ErrorTypes {
  PyObject *collective, *timeout, *peer_lost, *mismatch, *other_host;
};
ErrorTypes error_types;  // written once at import; the references live as long as the process

PyObject* type_of(Failure failure) {
  switch (failure) {
    case Failure::kTimeout:
      return error_types.timeout;
    case Failure::kPeerLost:
      return error_types.peer_lost;
    case Failure::kMismatch:
      return error_types.mismatch;
    case Failure::kOtherHost:
      return error_types.other_host;
    case Failure::kNone:
    case Failure::kOther:
      return error_types.collective;
  }
  return error_types.collective;
}

}  // namespace

bool PythonError::is_timeout() const { return type_ == error_types.timeout; }

void register_errors(pybind11::module_&) {
  namespace py = pybind11;
  const auto errors = py::module_::import("primitives.errors");
  auto hold = [&](const char* name) { return py::object(errors.attr(name)).release().ptr(); };
  error_types = {hold("CollectiveError"), hold("CollectiveTimeout"), hold("PeerLost"),
                 hold("CollectiveMismatch"), hold("RanksOnSeveralHosts")};
  pybind11::register_exception_translator([](std::exception_ptr pending) {
    try {
      if (pending) std::rethrow_exception(pending);
    } catch (PythonError& error) {
      pybind11::set_error(error.python_type(), error.what());
    }
  });
}

std::exception_ptr current_python_error() {
  try {
    throw;
  } catch (const TransportError& error) {
    return std::make_exception_ptr(PythonError(type_of(error.failure), error.what()));
  } catch (const std::invalid_argument& error) {
    return std::make_exception_ptr(PythonError(PyExc_ValueError, error.what()));
  } catch (...) {
    return std::current_exception();
  }
}

}  // namespace primitives
