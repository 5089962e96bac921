// Memory of the pretended card and pinned memory of the host.
//
// Real: addresses, sizes in units of 2 MiB, running out where the card would, pinned and device
// memory told apart. Pretended: the contents. A device address is one of the host that has no page
// until it is written, and nothing large is ever written there.

#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "state.h"

#define UNIT (2ull << 20)
#define UNITS (1u << 21)  // 4 TiB of addresses
#define SMALL 4096        // bytes; what is written to the card is kept up to this size

// Addresses, handed out in a circle: a later block never shares a unit with one that is in use, and
// a freed address comes back late, as it should for whoever uses it after all.
typedef struct {
  char *base;
  size_t next;
  uint32_t length[UNITS];  // in units, where a block begins
  uint8_t taken[UNITS];
} Region;

static Region device_region;
static Region host_region;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static size_t limit;
static size_t used;
static size_t peak;

// Regions and the limit

static void open_region(Region *region) {
  size_t size = UNITS * UNIT;
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  char *found = mmap(NULL, size + UNIT, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (found == MAP_FAILED) {
    perror("pretended card: no addresses");
    abort();
  }
  region->base = (char *)(((uintptr_t)found + UNIT - 1) & ~(uintptr_t)(UNIT - 1));
}

static void open_card(void) {
  if (limit) {
    return;
  }
  open_region(&device_region);
  open_region(&host_region);
  const char *asked = getenv("PRETENDED_GIB");
  limit = asked ? (size_t)(strtod(asked, NULL) * (1ull << 30)) : (size_t)CARD_MIB << 20;
  used = (size_t)CONTEXT_MIB << 20;
  peak = used;
}

static bool within(const Region *region, const void *address) {
  const char *at = address;
  return region->base && at >= region->base && at < region->base + UNITS * UNIT;
}

// The address of `count` free units, or NULL.
static void *take(Region *region, size_t count) {
  size_t first = region->next;
  for (size_t wrapped = 0; wrapped < 2;) {
    if (first + count > UNITS) {
      first = 0;
      wrapped++;
    }
    const uint8_t *obstacle = memchr(region->taken + first, 1, count);
    if (obstacle == NULL) {
      memset(region->taken + first, 1, count);
      region->length[first] = count;
      region->next = first + count;
      return region->base + first * UNIT;
    }
    first = obstacle - region->taken + 1;
  }
  return NULL;
}

// Units of the block at an address, which is free afterwards; 0 if no block begins there.
static size_t give(Region *region, void *address) {
  size_t offset = (char *)address - region->base;
  size_t first = offset / UNIT;
  size_t count = region->length[first];
  if (offset % UNIT || count == 0) {
    return 0;
  }
  memset(region->taken + first, 0, count);
  region->length[first] = 0;
  madvise(address, count * UNIT, MADV_DONTNEED);
  return count;
}

static size_t units(size_t bytes) {
  return bytes ? (bytes + UNIT - 1) / UNIT : 1;
}

// Device memory

EXPORT cudaError_t cudaMalloc(void **address, size_t bytes) {
  *address = NULL;
  if (forbidden()) {
    return failed(cudaErrorStreamCaptureUnsupported);
  }
  size_t count = units(bytes);
  pthread_mutex_lock(&lock);
  open_card();
  if (count <= UNITS && used + count * UNIT <= limit) {
    *address = take(&device_region, count);
  }
  if (*address) {
    used += count * UNIT;
    peak = used > peak ? used : peak;
  }
  pthread_mutex_unlock(&lock);
  return *address ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}

EXPORT cudaError_t cudaFree(void *address) {
  if (forbidden()) {
    return failed(cudaErrorStreamCaptureUnsupported);
  }
  if (address == NULL) {
    return cudaSuccess;
  }
  size_t count = 0;
  pthread_mutex_lock(&lock);
  if (within(&device_region, address)) {
    count = give(&device_region, address);
    used -= count * UNIT;
  }
  pthread_mutex_unlock(&lock);
  return count ? cudaSuccess : failed(cudaErrorInvalidValue);
}

EXPORT cudaError_t cudaMallocAsync(void **address, size_t bytes, cudaStream_t stream) {
  (void)stream;
  return cudaMalloc(address, bytes);
}

EXPORT cudaError_t cudaFreeAsync(void *address, cudaStream_t stream) {
  (void)stream;
  return cudaFree(address);
}

EXPORT cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
  pthread_mutex_lock(&lock);
  open_card();
  *available = limit - used;
  *total = limit;
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

EXPORT cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
  (void)symbol;
  return cudaMalloc(address, SMALL);
}

size_t card_limit(void) {
  size_t available;
  size_t total;
  cudaMemGetInfo(&available, &total);
  return total;
}

EXPORT size_t pretended_used(void) {
  return used;
}

EXPORT size_t pretended_peak(void) {
  return peak;
}

EXPORT bool pretended_on_device(const void *address) {
  return within(&device_region, address);
}

// Pinned memory: real, and counted by nobody

EXPORT cudaError_t cudaHostAlloc(void **address, size_t bytes, unsigned flags) {
  (void)flags;
  pthread_mutex_lock(&lock);
  open_card();
  *address = units(bytes) <= UNITS ? take(&host_region, units(bytes)) : NULL;
  pthread_mutex_unlock(&lock);
  return *address ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}

EXPORT cudaError_t cudaMallocHost(void **address, size_t bytes) {
  return cudaHostAlloc(address, bytes, cudaHostAllocDefault);
}

EXPORT cudaError_t cudaFreeHost(void *address) {
  pthread_mutex_lock(&lock);
  bool known = within(&host_region, address) && give(&host_region, address);
  pthread_mutex_unlock(&lock);
  return known || address == NULL ? cudaSuccess : failed(cudaErrorInvalidValue);
}

EXPORT cudaError_t cudaHostRegister(void *address, size_t bytes, unsigned flags) {
  (void)address;
  (void)bytes;
  (void)flags;
  return cudaSuccess;
}

EXPORT cudaError_t cudaHostUnregister(void *address) {
  (void)address;
  return cudaSuccess;
}

EXPORT bool pretended_pinned(const void *address) {
  return within(&host_region, address);
}

EXPORT cudaError_t cudaPointerGetAttributes(
    struct cudaPointerAttributes *found, const void *address) {
  bool device = pretended_on_device(address);
  bool pinned = pretended_pinned(address);
  memset(found, 0, sizeof *found);
  found->type = cudaMemoryTypeUnregistered;
  if (device || pinned) {
    found->type = device ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
  }
  found->devicePointer = device || pinned ? (void *)address : NULL;
  found->hostPointer = device ? NULL : (void *)address;
  return cudaSuccess;
}

// Copies and fills: done to host memory, and to the card where they are small, so that numbers and
// flags that the host sends come back as they were

static void copy(void *target, const void *source, size_t bytes) {
  if (!pretended_on_device(target) || bytes <= SMALL) {
    memmove(target, source, bytes);
  }
}

EXPORT cudaError_t cudaMemcpy(
    void *target, const void *source, size_t bytes, enum cudaMemcpyKind kind) {
  (void)kind;
  if (forbidden()) {
    return failed(cudaErrorStreamCaptureUnsupported);
  }
  count_wait();
  pretended_count(NULL, COPY);
  copy(target, source, bytes);
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpyAsync(
    void *target, const void *source, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
  (void)kind;
  if (!pretended_count(stream, COPY)) {
    copy(target, source, bytes);
  }
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpy2DAsync(
    void *target, size_t target_pitch, const void *source, size_t source_pitch, size_t width,
    size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
  (void)kind;
  bool captured = pretended_count(stream, COPY);
  for (size_t row = 0; row < height && !captured; row++) {
    copy((char *)target + row * target_pitch, (const char *)source + row * source_pitch, width);
  }
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpyPeerAsync(
    void *target, int to, const void *source, int from, size_t bytes, cudaStream_t stream) {
  (void)to;
  (void)from;
  return cudaMemcpyAsync(target, source, bytes, cudaMemcpyDeviceToDevice, stream);
}

EXPORT cudaError_t cudaMemcpyToSymbol(
    const void *symbol, const void *source, size_t bytes, size_t offset, enum cudaMemcpyKind kind) {
  (void)symbol;
  (void)source;
  (void)bytes;
  (void)offset;
  (void)kind;
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemsetAsync(void *target, int value, size_t bytes, cudaStream_t stream) {
  bool captured = pretended_count(stream, FILL);
  if (bytes <= SMALL && !captured) {
    memset(target, value, bytes);
  }
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemset(void *target, int value, size_t bytes) {
  return cudaMemsetAsync(target, value, bytes, NULL);
}
