#include "collectives/cuda/gpu.cuh"
#include "collectives/cuda/launch.h"
#include "collectives/cuda/prepare.hpp"

namespace primitives::cuda {
namespace {

__global__ void __launch_bounds__(kNumLanes, 1)
    move_kernel(const __grid_constant__ Ranks ranks, const __grid_constant__ Call call) {
  Gpu gpu;
  move_block(gpu, blockIdx.x, ranks, call);
}

template <class R>
__global__ void __launch_bounds__(kNumLanes, 1)
    reduce_kernel(const __grid_constant__ Ranks ranks, const __grid_constant__ Call call) {
  Gpu gpu;
  reduce_block<R>(gpu, blockIdx.x, ranks, call);
}

__global__ void __launch_bounds__(kNumLanes, 1)
    many_kernel(const __grid_constant__ Ranks ranks, const __grid_constant__ Call call) {
  Gpu gpu;
  many_block(gpu, blockIdx.x, ranks, call);
}

const void* find_kernel(Op op, DType dtype, ReduceOp reduce_op) {
  const void* kernel = reinterpret_cast<const void*>(is_fused(op) ? many_kernel : move_kernel);
  if (is_reduction(op)) {
    visit_reducer(dtype, reduce_op, [&](auto reducer) {
      kernel = reinterpret_cast<const void*>(reduce_kernel<decltype(reducer)>);
    });
  }
  return kernel;
}

int check(cudaError_t status, primitives_cuda_error* error) {
  if (status == cudaSuccess) return 0;
  snprintf(error->text, sizeof error->text, "%s: %s", cudaGetErrorName(status),
           cudaGetErrorString(status));
  cudaGetLastError();  // or the next kernel of somebody else would be blamed for it
  return -1;
}

}  // namespace
}  // namespace primitives::cuda

using namespace primitives;
using namespace primitives::cuda;

size_t primitives_cuda_segment_nbytes(uint32_t slot_nbytes) { return segment_nbytes(slot_nbytes); }

int primitives_cuda_max_blocks(int num_multiprocessors, int ranks_on_device, int num_groups) {
  return max_blocks(num_multiprocessors, ranks_on_device, num_groups);
}

int primitives_cuda_load(int device, primitives_cuda_error* error) {
  if (check(cudaSetDevice(device), error) != 0) return -1;
  cudaFuncAttributes attributes;
  for (const Op op : {Op::kBarrier, Op::kAllGatherMany}) {
    const void* kernel = find_kernel(op, DType::kFloat32, ReduceOp::kNone);
    if (check(cudaFuncGetAttributes(&attributes, kernel), error) != 0) return -1;
  }
  for (int dtype = 0; dtype <= static_cast<int>(DType::kBool); dtype++) {
    for (int op = 0; op <= static_cast<int>(ReduceOp::kBxor); op++) {
      const void* kernel = find_kernel(Op::kAllReduce, DType(dtype), ReduceOp(op));
      if (check(cudaFuncGetAttributes(&attributes, kernel), error) != 0) return -1;
    }
  }
  return 0;
}

int primitives_cuda_is_captured(int device, void* stream, primitives_cuda_error* error) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  if (check(cudaSetDevice(device), error) != 0 ||
      check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &capture), error) != 0) {
    return -1;
  }
  return capture != cudaStreamCaptureStatusNone;
}

int primitives_cuda_launch(int device, const primitives_cuda_ranks* ranks,
                           primitives_cuda_call call, void* stream, void* last,
                           primitives_cuda_error* error) {
  if (const char* refused = prepare(*ranks, &call); *refused != 0) {
    snprintf(error->text, sizeof error->text, "%s", refused);
    return -1;
  }
  const void* kernel = find_kernel(static_cast<Op>(call.op), static_cast<DType>(call.dtype),
                                   static_cast<ReduceOp>(call.reduce_op));
  Ranks by_value = *ranks;
  void* arguments[] = {&by_value, &call};
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const cudaEvent_t event = static_cast<cudaEvent_t>(last);
  const int captured = primitives_cuda_is_captured(device, stream, error);
  if (captured < 0) return -1;
  if (!captured && check(cudaStreamWaitEvent(on, event, 0), error) != 0) return -1;
  if (const Many& many = call.many; many.upload != nullptr) {
    const auto copied =
        cudaMemcpyAsync(many.table, many.upload, many.upload_nbytes, cudaMemcpyHostToDevice, on);
    if (check(copied, error) != 0) return -1;
  }
  if (check(cudaLaunchKernel(kernel, dim3(call.num_blocks), dim3(kNumLanes), arguments, 0, on),
            error) != 0) {
    return -1;
  }
  return captured ? 0 : check(cudaEventRecord(event, on), error);
}
