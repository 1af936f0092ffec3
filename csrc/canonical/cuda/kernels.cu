// The canonical kernels on CUDA.
#include <stdexcept>
#include <string>

#include "canonical/cuda/kernels.hpp"
#include "canonical/cuda/launch.hpp"
#include "canonical/cuda_thread.cuh"

namespace primitives::canonical {
namespace {

thread_local CudaStream current;

// Starts kernels on the stream of the calling thread.
class Launcher {
 public:
  Launcher() { check(cudaSetDevice(current.device)); }

  template <class Kernel>
  void run(const Kernel& kernel, const Grid& grid) const {
    if (grid.x > INT32_MAX) throw std::runtime_error("more than 2^31 - 1 blocks of threads");
    check(start(kernel, grid, static_cast<cudaStream_t>(current.stream)));
  }

  void reads(const void*, int64_t, int64_t) const {}
  void writes(const void*, int64_t, int64_t) const {}
  static int64_t enough_blocks() { return 128; }  // the multiprocessors of a large GPU

 private:
  static void check(cudaError_t code) {
    if (code == cudaSuccess) return;
    throw std::runtime_error(std::string(cudaGetErrorName(code)) + ": " + cudaGetErrorString(code));
  }
};

}  // namespace

const Kernels& cuda_kernels() {
  static const Kernels table = device_table<Launcher>();
  return table;
}

void set_cuda_stream(const CudaStream& stream) { current = stream; }

}  // namespace primitives::canonical
