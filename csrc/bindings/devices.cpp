#include "transport/devices.h"

#include "bindings/bindings.hpp"

namespace primitives {

void bind_devices(py::module_& m) {
#ifdef PRIMITIVES_CUDA
  m.attr("cuda_built") = true;
  m.def(
      "cuda_devices",
      [] {
        primitives_device devices[64];
        char error[256] = "";
        const int num_devices = primitives_cuda_devices(devices, 64, error, sizeof error);
        if (num_devices < 0) throw std::runtime_error(error);
        py::list result;
        for (int i = 0; i < num_devices && i < 64; i++) {
          const auto& d = devices[i];
          py::dict entry;
          entry["name"] = std::string(d.name);
          entry["capability"] = py::make_tuple(d.major, d.minor);
          entry["num_multiprocessors"] = d.num_multiprocessors;
          entry["memory_nbytes"] = d.memory_nbytes;
          entry["shared"] = d.shared != 0;
          entry["num_peers"] = d.num_peers;
          entry["num_linked"] = d.num_linked;
          result.append(entry);
        }
        return result;
      },
      "One dict per CUDA device; RuntimeError when there is no usable driver.");
#else
  m.attr("cuda_built") = false;
#endif
}

}  // namespace primitives
