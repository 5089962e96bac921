// CUDA on a CPU, as far as the kernels of csrc need it; g++ finds this file in place of CUDA's.
//
// A block's threads are fibers, announced to AddressSanitizer. Blocks run one after another, and in a block one
// warp after another as far as it comes: to a barrier, or to its end. Which comes first is drawn from a seed or
// reversed, for blocks, warps and lanes, so that what depends on it differs between two runs. At a shuffle a warp
// waits for its 32 lanes, at a barrier for all threads of the block; where one of them waits elsewhere or has
// ended, the program ends. Shared memory holds NaN where a block begins.

#pragma once

#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("shared_memory")))

extern char __start_shared_memory[], __stop_shared_memory[];  // made by the linker

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct uint3 { unsigned x, y, z; };
struct __nv_bfloat16 { uint16_t bits; };
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };

static uint3 threadIdx, blockIdx, blockDim;

static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static float2 make_float2(float x, float y) { return {x, y}; }
template <typename T> T __ldcs(const T* from) { return *from; }
template <typename T> void __stcs(T* to, T value) { *to = value; }

static float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float found;
  memcpy(&found, &bits, 4);
  return found;
}

// To the nearest, of two to the even one; every NaN becomes the same.
static __nv_bfloat16 __float2bfloat16_rn(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return {uint16_t(value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

static float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
static __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}

namespace cuda_on_cpu {

constexpr size_t kStack = 64 << 10;

enum State { ready, at_barrier, at_shuffle, ended };

struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
  void* fake_stack = nullptr;                   // AddressSanitizer's
  State state;
  int offset;                                   // of the shuffle
  double given, taken;                          // by it
};

static Fiber fibers[1024];                      // for every block the same
static Fiber* running;
static ucontext_t scheduler;
static const void* scheduler_stack;
static size_t scheduler_size;
static void (*body)(const void*);               // of a thread, called with `arguments`
static const void* arguments;

[[noreturn]] static void fail(const char* what) {
  fprintf(stderr, "block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
  _Exit(3);
}

// Called by the running fiber: lets others run until its state is `ready` again.
static void wait_as(State state) {
  Fiber& self = *running;
  self.state = state;
  __sanitizer_start_switch_fiber(&self.fake_stack, scheduler_stack, scheduler_size);
  swapcontext(&self.context, &scheduler);
  __sanitizer_finish_switch_fiber(self.fake_stack, &scheduler_stack, &scheduler_size);
}

static void live() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
  while (true) {
    body(arguments);
    wait_as(ended);
  }
}

static void begin(unsigned threads) {
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    fiber.state = ready;
    if (fiber.stack) continue;
    fiber.stack = static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, live, 0);
  }
}

static void resume(unsigned thread) {
  threadIdx.x = thread;
  running = &fibers[thread];
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, running->stack, kStack);
  swapcontext(&scheduler, &running->context);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

// Hands values over where all 32 lanes of the warp shuffle alike; whether they do.
static bool shuffle(unsigned warp) {
  Fiber* lane = &fibers[32 * warp];
  for (int i = 0; i < 32; ++i) {
    if (lane[i].state != at_shuffle || lane[i].offset != lane[0].offset) return false;
  }
  for (int i = 0; i < 32; ++i) {
    const int from = i + lane[i].offset;
    lane[i].taken = lane[from < 32 ? from : i].given;
    lane[i].state = ready;
  }
  return true;
}

// What comes first of blocks, warps and lanes: drawn from a seed, or the last where that is 0.
class Order {
 public:
  explicit Order(uint64_t seed) : state_(seed) {}

  std::vector<unsigned> operator()(unsigned count) {
    std::vector<unsigned> found(count);
    for (unsigned i = 0; i < count; ++i) found[i] = count - 1 - i;
    for (unsigned i = count; state_ && i > 1; --i) {
      state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
      std::swap(found[i - 1], found[state_ % i]);
    }
    return found;
  }

 private:
  uint64_t state_;
};

__attribute__((no_sanitize("address"))) static void spoil_shared_memory() {
  for (volatile char* at = __start_shared_memory; at < __stop_shared_memory; ++at) *at = '\xff';
}

static void run_block(unsigned threads, Order& order) {
  spoil_shared_memory();
  begin(threads);
  bool all_ended = false;
  while (!all_ended) {
    for (const unsigned warp : order(threads / 32)) {
      do {
        for (const unsigned lane : order(32)) {
          const unsigned t = 32 * warp + lane;
          if (fibers[t].state == ready) resume(t);
        }
      } while (shuffle(warp));
    }
    const auto all_are = [threads](State state) {
      return std::all_of(fibers, fibers + threads, [state](const Fiber& f) { return f.state == state; });
    };
    all_ended = all_are(ended);
    if (!all_ended && !all_are(at_barrier)) fail("some threads wait where others never come");
    if (!all_ended) begin(threads);
  }
}

// What csrc calls to start a kernel.
struct Launch {
  Order& order;

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, const Arguments&... given) const {
    const auto call = [&] { kernel(given...); };
    body = [](const void* call_of_kernel) { (*static_cast<decltype(call)*>(call_of_kernel))(); };
    arguments = &call;
    blockDim.x = threads;
    for (const unsigned block : order(blocks)) {
      blockIdx.x = block;
      run_block(threads, order);
    }
  }
};

}  // namespace cuda_on_cpu

static void __syncthreads() { cuda_on_cpu::wait_as(cuda_on_cpu::at_barrier); }

static double __shfl_down_sync(unsigned mask, double value, int offset) {
  if (mask != ~0u) cuda_on_cpu::fail("a shuffle of part of a warp");
  cuda_on_cpu::Fiber& self = *cuda_on_cpu::running;
  self.given = value;
  self.offset = offset;
  cuda_on_cpu::wait_as(cuda_on_cpu::at_shuffle);
  return self.taken;
}
