// The CUDA kernels of canonical arithmetic on the emulated device, for tests/canonical_emulator.py.
#include <cstdint>
#include <stdexcept>

#include "canonical/cuda/launch.hpp"
#include "emulator/device.hpp"

namespace primitives::canonical {
namespace {

uint32_t seed = 0;          // of the order in which blocks and threads run
int64_t enough_blocks = 1;  // decides how large the tiles of a matrix product are

class EmulatedLauncher {
 public:
  template <class Kernel>
  void run(const Kernel& kernel, const Grid& grid) {
    if (device_.run(kernel, grid) != 0) throw std::runtime_error(device_.error());
  }
  void reads(const void* x, int64_t numel, int64_t itemsize) {
    device_.given().allow(x, 1, 0, numel * itemsize, false);
  }
  void writes(const void* x, int64_t numel, int64_t itemsize) {
    device_.given().allow(x, 1, 0, numel * itemsize, true);
  }
  int64_t enough_blocks() const { return device_.enough_blocks(); }

 private:
  emulator::Device device_{seed, canonical::enough_blocks};
};

const Kernels kEmulatedKernels = device_table<EmulatedLauncher>();

}  // namespace

extern "C" {

const Kernels* emulated_kernels() { return &kEmulatedKernels; }

void set_emulation(uint32_t new_seed, int64_t new_enough_blocks) {
  seed = new_seed;
  enough_blocks = new_enough_blocks;
}
}

}  // namespace primitives::canonical
