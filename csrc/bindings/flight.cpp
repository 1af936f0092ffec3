#include "transport/flight.hpp"

#include "bindings/bindings.hpp"
#include "bindings/c10d_errors.hpp"

namespace primitives {

void bind_flight(py::module_& m) {
  m.def(
      "flight_json", [](const std::string& reason) { return flight_json(reason); },
      py::arg("reason"), "The flight recorder and where the ranks stand, as JSON.");
  m.def(
      "dump_flight",
      [](const std::string& folder, const std::string& reason) {
        return translated([&] { return dump_flight(folder, reason); });
      },
      py::arg("folder"), py::arg("reason"), "Writes flight_json into a file of the folder.");
}

}  // namespace primitives
