// libcuda.so.1 of the pretended card, as far as Triton and torch's compiler use it.
//
// Real: which launches an H100 refuses, whether a pointer is one of the card. Pretended: modules,
// kernels (32 registers, no spills) and occupancy. Counts and memory are those of the preloaded
// runtime library.

#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "pretended.h"

static char context;  // its address is the only context
static char module;
static char function;

// The device

EXPORT CUresult cuInit(unsigned flags) {
  (void)flags;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDriverGetVersion(int *version) {
  *version = CUDA_VERSION_HERE;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = 0;
  return ordinal == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

EXPORT CUresult cuDeviceGetCount(int *count) {
  *count = 1;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
  (void)device;
  snprintf(name, length, "%s", CARD_NAME);
  return CUDA_SUCCESS;
}

static int attribute(CUdevice_attribute name) {
  switch (name) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      return 9;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      return 0;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      return PROCESSORS;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      return 32;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK:
      return SHARED_PLAIN;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      return SHARED_MOST;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      return SHARED_PROCESSOR;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
      return REGISTERS;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      return THREADS_MOST;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR:
      return 2048;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
      return 1980000;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
      return 2619000;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH:
      return 5120;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE:
      return L2_BYTES;
    default:
      return 1;
  }
}

EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute name, CUdevice device) {
  (void)device;
  *value = attribute(name);
  return CUDA_SUCCESS;
}

// The context

EXPORT CUresult cuCtxGetCurrent(CUcontext *found) {
  *found = (CUcontext)&context;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxSetCurrent(CUcontext one) {
  (void)one;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxPushCurrent(CUcontext one) {
  (void)one;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxPopCurrent(CUcontext *found) {
  return cuCtxGetCurrent(found);
}

EXPORT CUresult cuCtxGetDevice(CUdevice *device) {
  *device = 0;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetLimit(size_t *value, CUlimit name) {
  (void)name;
  *value = 0;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxSetLimit(CUlimit name, size_t value) {
  (void)name;
  (void)value;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *found, CUdevice device) {
  (void)device;
  return cuCtxGetCurrent(found);
}

EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
  (void)device;
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}

// Streams are the runtime's

int cudaDeviceSynchronize(void);
int cudaStreamSynchronize(CUstream stream);
int cudaStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status);

EXPORT CUresult cuCtxSynchronize(void) {
  return cudaDeviceSynchronize();
}

EXPORT CUresult cuStreamSynchronize(CUstream stream) {
  return cudaStreamSynchronize(stream);
}

EXPORT CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  return cudaStreamIsCapturing(stream, status);
}

// Modules and kernels

EXPORT CUresult cuModuleLoadData(CUmodule *found, const void *image) {
  (void)image;
  *found = (CUmodule)&module;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleLoadDataEx(
    CUmodule *found, const void *image, unsigned count, CUjit_option *options, void **values) {
  (void)count;
  (void)options;
  (void)values;
  return cuModuleLoadData(found, image);
}

EXPORT CUresult cuModuleLoad(CUmodule *found, const char *file) {
  return cuModuleLoadData(found, file);
}

EXPORT CUresult cuModuleUnload(CUmodule one) {
  (void)one;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleGetFunction(CUfunction *found, CUmodule one, const char *name) {
  (void)one;
  (void)name;
  *found = (CUfunction)&function;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncGetAttribute(int *value, CUfunction_attribute name, CUfunction kernel) {
  (void)kernel;
  switch (name) {
    case CU_FUNC_ATTRIBUTE_NUM_REGS:
      *value = 32;
      break;
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      *value = THREADS_MOST;
      break;
    default:
      *value = 0;
  }
  return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncSetAttribute(CUfunction kernel, CUfunction_attribute name, int value) {
  (void)kernel;
  bool shared = name == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
  return shared && value > SHARED_MOST ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

EXPORT CUresult cuFuncSetCacheConfig(CUfunction kernel, CUfunc_cache preference) {
  (void)kernel;
  (void)preference;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(
    int *blocks, CUfunction kernel, int threads, size_t shared) {
  (void)kernel;
  (void)threads;
  (void)shared;
  *blocks = 2;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuOccupancyMaxActiveClusters(
    int *clusters, CUfunction kernel, const CUlaunchConfig *how) {
  (void)kernel;
  (void)how;
  *clusters = 2;
  return CUDA_SUCCESS;
}

// Launches

EXPORT CUresult cuLaunchKernel(
    CUfunction kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
    unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void **arguments,
    void **extra) {
  (void)kernel;
  (void)arguments;
  (void)extra;
  unsigned grid[3] = {grid_x, grid_y, grid_z};
  unsigned block[3] = {block_x, block_y, block_z};
  if (pretended_refusal(grid, block, shared)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  pretended_count(stream, KERNEL);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuLaunchKernelEx(
    const CUlaunchConfig *how, CUfunction kernel, void **arguments, void **extra) {
  return cuLaunchKernel(
      kernel, how->gridDimX, how->gridDimY, how->gridDimZ, how->blockDimX, how->blockDimY,
      how->blockDimZ, how->sharedMemBytes, how->hStream, arguments, extra);
}

EXPORT CUresult cuLaunchCooperativeKernel(
    CUfunction kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
    unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void **arguments) {
  return cuLaunchKernel(
      kernel, grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, stream, arguments, NULL);
}

// Memory: Triton asks whether a pointer is one that a kernel can read

EXPORT CUresult cuPointerGetAttribute(
    void *value, CUpointer_attribute name, CUdeviceptr address) {
  const void *at = (const void *)address;
  if (!pretended_on_device(at) && !pretended_pinned(at)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  switch (name) {
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
      *(CUdeviceptr *)value = address;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      *(unsigned *)value = pretended_pinned(at) ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      *(int *)value = 0;
      return CUDA_SUCCESS;
    default:
      return CUDA_ERROR_NOT_SUPPORTED;
  }
}

EXPORT CUresult cuPointerGetAttributes(
    unsigned count, CUpointer_attribute *names, void **values, CUdeviceptr address) {
  for (unsigned i = 0; i < count; i++) {
    CUresult error = cuPointerGetAttribute(values[i], names[i], address);
    if (error) {
      return error;
    }
  }
  return CUDA_SUCCESS;
}

EXPORT CUresult cuTensorMapEncodeTiled(
    CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
    const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
    const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  (void)type;
  (void)rank;
  (void)address;
  (void)sizes;
  (void)strides;
  (void)box;
  (void)steps;
  (void)interleave;
  (void)swizzle;
  (void)promotion;
  (void)fill;
  memset(map, 0, sizeof *map);
  return CUDA_SUCCESS;
}

// Errors, and functions by their names

EXPORT CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_INVALID_VALUE ? "invalid argument" : "refused by the pretended card";
  return CUDA_SUCCESS;
}

EXPORT CUresult cuGetErrorName(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR_UNKNOWN";
  return CUDA_SUCCESS;
}

// What torch looks up at its start and may never call.
EXPORT CUresult pretended_absent(void) {
  return CUDA_ERROR_NOT_SUPPORTED;
}

// The compiler of CUDA C at run time asks for a private table of the driver's, and goes without.
EXPORT CUresult cuGetExportTable(const void **table, const CUuuid *id) {
  (void)id;
  *table = NULL;
  return CUDA_ERROR_NOT_FOUND;
}

EXPORT CUresult cuGetProcAddress(
    const char *name, void **found, int version, cuuint64_t flags,
    CUdriverProcAddressQueryResult *result) {
  (void)version;
  (void)flags;
  void *own = dlopen("libcuda.so.1", RTLD_LAZY);
  *found = own ? dlsym(own, name) : NULL;
  if (result) {
    *result = *found ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  }
  return *found ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
