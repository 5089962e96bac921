// The CUDA runtime of the pretended card: the device, its launches and its errors. Memory is in
// memory.c, streams and graphs in streams.c, matrix products in blas.c.
//
// Real: which launches an H100 refuses, how many there are. Pretended: what kernels do, and how
// many registers they take. What is not here (the registration of kernels, names of errors) is
// done by CUDA's own library, which needs no GPU for it.

#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "state.h"

// Errors

static _Thread_local cudaError_t last_error;

cudaError_t failed(cudaError_t error) {
  last_error = error;
  return error;
}

EXPORT cudaError_t cudaPeekAtLastError(void) {
  return last_error;
}

EXPORT cudaError_t cudaGetLastError(void) {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

// The device

static int attribute(enum cudaDeviceAttr name) {
  switch (name) {
    case cudaDevAttrComputeCapabilityMajor:
      return 9;
    case cudaDevAttrComputeCapabilityMinor:
      return 0;
    case cudaDevAttrMultiProcessorCount:
      return PROCESSORS;
    case cudaDevAttrWarpSize:
      return 32;
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
      return THREADS_MOST;
    case cudaDevAttrMaxBlockDimZ:
      return 64;
    case cudaDevAttrMaxGridDimX:
      return INT32_MAX;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      return UINT16_MAX;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return SHARED_PLAIN;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return SHARED_MOST;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return SHARED_PROCESSOR;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return 2048;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      return 32;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      return REGISTERS;
    case cudaDevAttrL2CacheSize:
      return L2_BYTES;
    case cudaDevAttrGlobalMemoryBusWidth:
      return 5120;
    case cudaDevAttrClockRate:
      return 1980000;
    case cudaDevAttrMemoryClockRate:
      return 2619000;
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrConcurrentKernels:
      return 1;
    default:
      return 0;
  }
}

EXPORT cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr name, int device) {
  (void)device;
  *value = attribute(name);
  return cudaSuccess;
}

EXPORT cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
  (void)device;
  memset(found, 0, sizeof *found);
  strcpy(found->name, CARD_NAME);
  found->totalGlobalMem = card_limit();
  found->major = attribute(cudaDevAttrComputeCapabilityMajor);
  found->minor = attribute(cudaDevAttrComputeCapabilityMinor);
  found->multiProcessorCount = PROCESSORS;
  found->warpSize = 32;
  found->maxThreadsPerBlock = THREADS_MOST;
  found->maxThreadsDim[0] = THREADS_MOST;
  found->maxThreadsDim[1] = THREADS_MOST;
  found->maxThreadsDim[2] = 64;
  found->maxGridSize[0] = INT32_MAX;
  found->maxGridSize[1] = UINT16_MAX;
  found->maxGridSize[2] = UINT16_MAX;
  found->sharedMemPerBlock = SHARED_PLAIN;
  found->sharedMemPerBlockOptin = SHARED_MOST;
  found->sharedMemPerMultiprocessor = SHARED_PROCESSOR;
  found->regsPerBlock = REGISTERS;
  found->regsPerMultiprocessor = REGISTERS;
  found->maxThreadsPerMultiProcessor = 2048;
  found->maxBlocksPerMultiProcessor = 32;
  found->l2CacheSize = L2_BYTES;
  found->memoryBusWidth = 5120;
  found->textureAlignment = 512;
  found->unifiedAddressing = 1;
  found->cooperativeLaunch = 1;
  found->clusterLaunch = 1;
  return cudaSuccess;
}

EXPORT cudaError_t cudaGetDeviceCount(int *count) {
  *count = 1;
  return cudaSuccess;
}

EXPORT cudaError_t cudaGetDevice(int *device) {
  *device = 0;
  return cudaSuccess;
}

EXPORT cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : failed(cudaErrorInvalidDevice);
}

EXPORT cudaError_t cudaDriverGetVersion(int *version) {
  *version = CUDA_VERSION_HERE;
  return cudaSuccess;
}

EXPORT cudaError_t cudaRuntimeGetVersion(int *version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
  (void)device;
  (void)peer;
  *can = 0;
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
  (void)peer;
  (void)flags;
  return failed(cudaErrorInvalidDevice);
}

EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int device) {
  (void)device;
  snprintf(id, length, "0000:01:00.0");
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) {
  static char only_one;
  (void)device;
  *pool = (cudaMemPool_t)&only_one;
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemPoolGetAttribute(
    cudaMemPool_t pool, enum cudaMemPoolAttr name, void *value) {
  (void)pool;
  (void)name;
  *(uint64_t *)value = 0;
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemPoolSetAttribute(
    cudaMemPool_t pool, enum cudaMemPoolAttr name, void *value) {
  (void)pool;
  (void)name;
  (void)value;
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemPoolTrimTo(cudaMemPool_t pool, size_t bytes) {
  (void)pool;
  (void)bytes;
  return cudaSuccess;
}

EXPORT cudaError_t cudaProfilerStart(void) {
  return cudaSuccess;
}

EXPORT cudaError_t cudaProfilerStop(void) {
  return cudaSuccess;
}

// Launches

EXPORT int pretended_refusal(const unsigned grid[3], const unsigned block[3], size_t shared) {
  for (int axis = 0; axis < 3; axis++) {
    unsigned most = axis == 0 ? INT32_MAX : UINT16_MAX;
    if (grid[axis] == 0 || grid[axis] > most || block[axis] == 0) {
      return cudaErrorInvalidConfiguration;
    }
  }
  size_t threads = (size_t)block[0] * block[1] * block[2];
  if (threads > THREADS_MOST || block[2] > 64) {
    return cudaErrorInvalidConfiguration;
  }
  return shared > SHARED_MOST ? cudaErrorInvalidValue : cudaSuccess;
}

static cudaError_t launch(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  unsigned blocks[3] = {grid.x, grid.y, grid.z};
  unsigned threads[3] = {block.x, block.y, block.z};
  cudaError_t refusal = pretended_refusal(blocks, threads, shared);
  if (refusal) {
    return failed(refusal);
  }
  pretended_count(stream, KERNEL);
  return cudaSuccess;
}

EXPORT cudaError_t cudaLaunchKernel(
    const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
    cudaStream_t stream) {
  (void)kernel;
  (void)arguments;
  return launch(grid, block, shared, stream);
}

EXPORT cudaError_t __cudaLaunchKernel(
    cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
    cudaStream_t stream) {
  (void)kernel;
  (void)arguments;
  return launch(grid, block, shared, stream);
}

EXPORT cudaError_t cudaLaunchCooperativeKernel(
    const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
    cudaStream_t stream) {
  (void)kernel;
  (void)arguments;
  return launch(grid, block, shared, stream);
}

EXPORT cudaError_t cudaLaunchKernelExC(
    const cudaLaunchConfig_t *how, const void *kernel, void **arguments) {
  (void)kernel;
  (void)arguments;
  return launch(how->gridDim, how->blockDim, how->dynamicSmemBytes, how->stream);
}

EXPORT cudaError_t __cudaGetKernel(cudaKernel_t *found, const void *kernel) {
  *found = (cudaKernel_t)kernel;
  return cudaSuccess;
}

EXPORT cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *kernel) {
  (void)kernel;
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = THREADS_MOST;
  found->maxDynamicSharedSizeBytes = SHARED_PLAIN;
  found->numRegs = 32;
  found->binaryVersion = 90;
  found->ptxVersion = 90;
  return cudaSuccess;
}

EXPORT cudaError_t cudaFuncSetAttribute(
    const void *kernel, enum cudaFuncAttribute name, int value) {
  (void)kernel;
  if (name == cudaFuncAttributeMaxDynamicSharedMemorySize && value > SHARED_MOST) {
    return failed(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, const void *kernel, int threads, size_t shared, unsigned flags) {
  (void)kernel;
  (void)threads;
  (void)shared;
  (void)flags;
  *blocks = 2;
  return cudaSuccess;
}

EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(
    int *blocks, const void *kernel, int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, kernel, threads, shared, 0);
}

// The driver's functions, from the pretended driver

EXPORT cudaError_t cudaGetDriverEntryPointByVersion(
    const char *name, void **found, unsigned version, unsigned long long flags,
    enum cudaDriverEntryPointQueryResult *result) {
  (void)version;
  (void)flags;
  void *driver = dlopen("libcuda.so.1", RTLD_LAZY);
  *found = driver ? dlsym(driver, name) : NULL;
  if (*found == NULL && driver) {
    *found = dlsym(driver, "pretended_absent");
  }
  if (result) {
    *result = *found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  }
  return *found ? cudaSuccess : failed(cudaErrorUnknown);
}
