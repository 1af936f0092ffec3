#include <cuda.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>

#include "transport/device_virtual.h"

namespace {

// The functions of the driver, which is no library to link with: there may be none.
struct Driver {
  decltype(&cuGetErrorName) name_of;
  decltype(&cuMemGetAllocationGranularity) granularity;
  decltype(&cuMemCreate) create;
  decltype(&cuMemRelease) release;
  decltype(&cuMemRetainAllocationHandle) retain;
  decltype(&cuMemExportToShareableHandle) export_to;
  decltype(&cuMemImportFromShareableHandle) import_from;
  decltype(&cuMemAddressReserve) reserve;
  decltype(&cuMemAddressFree) unreserve;
  decltype(&cuMemMap) map;
  decltype(&cuMemUnmap) unmap;
  decltype(&cuMemSetAccess) set_access;
  bool complete;

  Driver() : complete(false) {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return;
    complete = find(library, "cuGetErrorName", &name_of) &&
               find(library, "cuMemGetAllocationGranularity", &granularity) &&
               find(library, "cuMemCreate", &create) && find(library, "cuMemRelease", &release) &&
               find(library, "cuMemRetainAllocationHandle", &retain) &&
               find(library, "cuMemExportToShareableHandle", &export_to) &&
               find(library, "cuMemImportFromShareableHandle", &import_from) &&
               find(library, "cuMemAddressReserve", &reserve) &&
               find(library, "cuMemAddressFree", &unreserve) && find(library, "cuMemMap", &map) &&
               find(library, "cuMemUnmap", &unmap) && find(library, "cuMemSetAccess", &set_access);
  }

  template <class Function>
  static bool find(void* library, const char* name, Function* function) {
    *function = reinterpret_cast<Function>(dlsym(library, name));
    return *function != nullptr;
  }
};

const Driver& driver() {
  static const Driver found;
  return found;
}

int check(CUresult status, const char* what, primitives_cuda_error* error) {
  if (status == CUDA_SUCCESS) return 0;
  const char* name = "an unknown error";
  driver().name_of(status, &name);
  snprintf(error->text, sizeof error->text, "%s: %s", what, name);
  return -1;
}

// Makes the device the current one, with its context.
int use(int device, primitives_cuda_error* error) {
  const cudaError_t status = cudaSetDevice(device);
  if (status != cudaSuccess) {
    snprintf(error->text, sizeof error->text, "cudaSetDevice: %s", cudaGetErrorName(status));
    cudaGetLastError();
    return -1;
  }
  if (driver().complete) return 0;
  snprintf(error->text, sizeof error->text, "this driver has no virtual memory API");
  return -1;
}

CUmemAllocationProp properties_on(int device) {
  CUmemAllocationProp properties = {};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = device;
  return properties;
}

// At an address of its own, for the device to read and write.
int map(int device, CUmemGenericAllocationHandle memory, size_t nbytes, char** mapped,
        primitives_cuda_error* error) {
  CUdeviceptr at = 0;
  if (check(driver().reserve(&at, nbytes, 0, 0, 0), "cuMemAddressReserve", error) != 0) return -1;
  if (check(driver().map(at, nbytes, 0, memory, 0), "cuMemMap", error) != 0) {
    driver().unreserve(at, nbytes);
    return -1;
  }
  CUmemAccessDesc access = {};
  access.location = properties_on(device).location;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  if (check(driver().set_access(at, nbytes, &access, 1), "cuMemSetAccess", error) != 0) {
    driver().unmap(at, nbytes);
    driver().unreserve(at, nbytes);
    return -1;
  }
  *mapped = reinterpret_cast<char*>(at);
  return 0;
}

}  // namespace

int primitives_cuda_virtual_unit(int device, size_t* nbytes, primitives_cuda_error* error) {
  if (use(device, error) != 0) return -1;
  const CUmemAllocationProp properties = properties_on(device);
  return check(driver().granularity(nbytes, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
               "cuMemGetAllocationGranularity", error);
}

int primitives_cuda_virtual_create(int device, size_t nbytes, char** memory,
                                   primitives_cuda_error* error) {
  if (use(device, error) != 0) return -1;
  const CUmemAllocationProp properties = properties_on(device);
  CUmemGenericAllocationHandle made;
  if (check(driver().create(&made, nbytes, &properties, 0), "cuMemCreate", error) != 0) return -1;
  const int status = map(device, made, nbytes, memory, error);
  driver().release(made);  // what is mapped stays
  return status;
}

int primitives_cuda_virtual_export(int device, char* memory, int* fd,
                                   primitives_cuda_error* error) {
  if (use(device, error) != 0) return -1;
  CUmemGenericAllocationHandle found;
  if (check(driver().retain(&found, memory), "cuMemRetainAllocationHandle", error) != 0) return -1;
  const int status =
      check(driver().export_to(fd, found, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
            "cuMemExportToShareableHandle", error);
  driver().release(found);
  return status;
}

int primitives_cuda_virtual_open(int device, int fd, size_t nbytes, char** memory,
                                 primitives_cuda_error* error) {
  if (use(device, error) != 0) return -1;
  CUmemGenericAllocationHandle found;
  void* const descriptor = reinterpret_cast<void*>(static_cast<intptr_t>(fd));
  if (check(driver().import_from(&found, descriptor, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
            "cuMemImportFromShareableHandle", error) != 0) {
    return -1;
  }
  const int status = map(device, found, nbytes, memory, error);
  driver().release(found);
  return status;
}

void primitives_cuda_virtual_close(int device, char* memory, size_t nbytes) {
  primitives_cuda_error error;
  if (use(device, &error) != 0) return;
  cudaDeviceSynchronize();  // as cudaFree does: kernels may still use it
  cudaGetLastError();
  const auto at = reinterpret_cast<CUdeviceptr>(memory);
  driver().unmap(at, nbytes);
  driver().unreserve(at, nbytes);
}
