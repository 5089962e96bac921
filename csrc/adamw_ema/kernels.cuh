// The kernels of adamw_ema.cu and their launches, free of torch, so that tests/csrc/ can run them on a CPU.
//
// Per element 36 bytes with fp32 gradients and an EMA: gradient, parameter, both moments and the EMA
// are read, all but the gradient are written. Nothing is read back to the host.

#include <cuda_bf16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace {

constexpr int kThreads = 256;
constexpr int kVector = 4;                      // elements per access: 16 bytes of fp32
constexpr int64_t kChunk = 32 * kThreads;       // elements per block; repeated in cuda.py
constexpr int kTensors = 320;                   // per launch: the table is a kernel argument
constexpr int kSumThreads = 1024;

struct Entry {
  float* param;
  const void* grad;                             // fp32 or bf16
  float* exp_avg;
  float* exp_avg_sq;
  float* ema;                                   // or null
  __nv_bfloat16* param_copy;                    // or null
  int64_t numel;
  int first_block;                              // of its launch
  bool bf16_grad;
  bool aligned;                                 // every pointer allows vector accesses
};

struct Table {
  Entry entries[kTensors];
  int count;
};

struct Options {
  const float* lr;
  const float* grad_scale;                      // the gradient is multiplied by it
  const float* skip;                            // not zero: nothing changes
  const float* ema_rate;                        // 1 - decay; read where there is an ema
  const float2* factors;                        // per tensor: 1 / (1 - b1^t), 1 / sqrt(1 - b2^t)
  float beta1, beta2, one_minus_beta1, one_minus_beta2, eps, weight_decay;
};

struct Steps {
  float* steps[kTensors];
  int count;
};

struct Rates {
  float decay, scale, step_size, inverse_root, ema;
};

// The entry that block `block` works on: the last one that starts at or before it.
__device__ int find(const Table& table, int block) {
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.entries[middle].first_block <= block) low = middle;
    else high = middle - 1;
  }
  return low;
}

// Access to one element, and to kVector.
__device__ void load(float (&to)[1], const float* from) { to[0] = *from; }
__device__ void load(float (&to)[1], const __nv_bfloat16* from) { to[0] = __bfloat162float(*from); }
__device__ void store(float* to, const float (&from)[1]) { *to = from[0]; }
__device__ void store(__nv_bfloat16* to, const float (&from)[1]) { *to = __float2bfloat16_rn(from[0]); }

__device__ void load(float (&to)[kVector], const float* from) {
  const float4 raw = __ldcs(reinterpret_cast<const float4*>(from));
  to[0] = raw.x, to[1] = raw.y, to[2] = raw.z, to[3] = raw.w;
}

__device__ void load(float (&to)[kVector], const __nv_bfloat16* from) {
  const uint2 raw = __ldcs(reinterpret_cast<const uint2*>(from));
  const float2 low = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&raw.x));
  const float2 high = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&raw.y));
  to[0] = low.x, to[1] = low.y, to[2] = high.x, to[3] = high.y;
}

__device__ void store(float* to, const float (&from)[kVector]) {
  __stcs(reinterpret_cast<float4*>(to), float4{from[0], from[1], from[2], from[3]});
}

__device__ void store(__nv_bfloat16* to, const float (&from)[kVector]) {
  const __nv_bfloat162 low = __floats2bfloat162_rn(from[0], from[1]);
  const __nv_bfloat162 high = __floats2bfloat162_rn(from[2], from[3]);
  uint2 raw;
  raw.x = *reinterpret_cast<const unsigned*>(&low);
  raw.y = *reinterpret_cast<const unsigned*>(&high);
  __stcs(reinterpret_cast<uint2*>(to), raw);
}

// Calls visit(width, i) for the elements of this block's chunk: width of them from i on.
template <typename Visit>
__device__ void visit_chunk(const Entry& e, Visit visit) {
  const int64_t start = (blockIdx.x - e.first_block) * kChunk;
  const int64_t end = min(start + kChunk, e.numel);
  const int64_t whole = e.aligned ? start + (end - start) / kVector * kVector : start;
  const std::integral_constant<int, 1> one;
  const std::integral_constant<int, kVector> vector;
  for (int64_t i = start + threadIdx.x * kVector; i < whole; i += kThreads * kVector) visit(vector, i);
  for (int64_t i = whole + threadIdx.x; i < end; i += kThreads) visit(one, i);
}

__device__ void update(float& p, float g, float& m, float& v, const Options& o, const Rates& r) {
  g *= r.scale;
  p -= r.decay * p;
  m += o.one_minus_beta1 * (g - m);
  v = o.beta2 * v + o.one_minus_beta2 * g * g;
  p -= r.step_size * m / (sqrtf(v) * r.inverse_root + o.eps);
}

template <typename Grad, bool averaged>
__device__ void update_chunk(const Entry& e, const Options& o, const Rates& r) {
  visit_chunk(e, [&](auto width, int64_t i) {
    constexpr int n = decltype(width)::value;
    float g[n], p[n], m[n], v[n];
    [[maybe_unused]] float a[n];
    load(g, static_cast<const Grad*>(e.grad) + i);
    load(p, e.param + i);
    load(m, e.exp_avg + i);
    load(v, e.exp_avg_sq + i);
    if constexpr (averaged && n > 1) load(a, e.ema + i);
    for (int k = 0; k < n; ++k) update(p[k], g[k], m[k], v[k], o, r);
    store(e.param + i, p);
    store(e.exp_avg + i, m);
    store(e.exp_avg_sq + i, v);
    if (e.param_copy) store(e.param_copy + i, p);
    if constexpr (averaged) {
      if constexpr (n == 1) load(a, e.ema + i);  // here it needs fewer registers
      for (int k = 0; k < n; ++k) a[k] += r.ema * (p[k] - a[k]);
      store(e.ema + i, a);
    }
  });
}

// One thread per tensor: advances its step and computes its bias corrections.
__global__ void advance_kernel(
    const __grid_constant__ Steps table, const float* skip, double beta1, double beta2, float2* factors) {
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  if (t >= table.count || *skip != 0.0f) return;
  const float step = *table.steps[t] + 1.0f;
  *table.steps[t] = step;
  factors[t] = make_float2(
      static_cast<float>(1.0 / (1.0 - pow(beta1, static_cast<double>(step)))),
      static_cast<float>(1.0 / sqrt(1.0 - pow(beta2, static_cast<double>(step)))));
}

__global__ void __launch_bounds__(kThreads)
    adamw_ema_kernel(const __grid_constant__ Table table, const __grid_constant__ Options o) {
  if (*o.skip != 0.0f) return;
  const int t = find(table, blockIdx.x);
  const Entry& e = table.entries[t];
  const float2 factors = o.factors[t];
  const float lr = *o.lr;
  const Rates r = {lr * o.weight_decay, *o.grad_scale, lr * factors.x, factors.y, e.ema ? *o.ema_rate : 0.0f};
  if (e.bf16_grad) {
    e.ema ? update_chunk<__nv_bfloat16, true>(e, o, r) : update_chunk<__nv_bfloat16, false>(e, o, r);
  } else {
    e.ema ? update_chunk<float, true>(e, o, r) : update_chunk<float, false>(e, o, r);
  }
}

// Sum over a block, in the same order every time; valid in thread 0.
__device__ double block_sum(double value, int threads) {
  __shared__ double of_warp[kSumThreads / 32];
  for (int offset = 16; offset; offset /= 2) value += __shfl_down_sync(~0u, value, offset);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  value = threadIdx.x < threads / 32 ? of_warp[threadIdx.x] : 0.0;
  if (threadIdx.x < 32) {
    for (int offset = 16; offset; offset /= 2) value += __shfl_down_sync(~0u, value, offset);
  }
  return value;
}

template <typename Grad>
__device__ float squares_of_chunk(const Entry& e) {
  float sum = 0.0f;
  visit_chunk(e, [&](auto width, int64_t i) {
    float g[decltype(width)::value];
    load(g, static_cast<const Grad*>(e.grad) + i);
    float squares = g[0] * g[0];
    for (int k = 1; k < decltype(width)::value; ++k) squares += g[k] * g[k];
    sum += squares;
  });
  return sum;
}

__global__ void __launch_bounds__(kThreads)
    squares_kernel(const __grid_constant__ Table table, double* partials) {
  const Entry& e = table.entries[find(table, blockIdx.x)];
  const float mine = e.bf16_grad ? squares_of_chunk<__nv_bfloat16>(e) : squares_of_chunk<float>(e);
  const double sum = block_sum(mine, kThreads);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(const double* partials, int64_t count, double* out) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) sum += partials[i];
  sum = block_sum(sum, kSumThreads);
  if (threadIdx.x == 0) *out = sum;
}

// The host's side. launch(kernel, blocks, threads, arguments...) starts a kernel.

int64_t chunks(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

bool is_aligned(const Entry& e) {
  const auto at = [](const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; };
  return at(e.grad, e.bf16_grad ? 8 : 16) && at(e.param, 16) && at(e.exp_avg, 16) && at(e.exp_avg_sq, 16) &&
         at(e.ema, 16) && at(e.param_copy, 8);
}

// Calls each(table, start, blocks) with as many entries from `start` on as a launch takes.
template <typename Each>
void cut(const std::vector<Entry>& entries, Each each) {
  Table table;
  for (size_t start = 0; start < entries.size(); start += kTensors) {
    int64_t blocks = 0;
    table.count = static_cast<int>(std::min<size_t>(kTensors, entries.size() - start));
    for (int i = 0; i < table.count; ++i) {
      Entry& e = table.entries[i] = entries[start + i];
      e.aligned = is_aligned(e);
      e.first_block = static_cast<int>(blocks);
      blocks += chunks(e.numel);
    }
    each(table, start, blocks);
  }
}

// A step of all entries, whose counts of steps are `steps`; of `o` the first four pointers are set.
template <typename Launch>
void step(
    const std::vector<Entry>& entries, const std::vector<float*>& steps, Options o, float2* factors, double beta1,
    double beta2, double eps, double weight_decay, const Launch& launch) {
  o.beta1 = static_cast<float>(beta1);
  o.beta2 = static_cast<float>(beta2);
  o.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  o.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  o.eps = static_cast<float>(eps);
  o.weight_decay = static_cast<float>(weight_decay);
  cut(entries, [&](const Table& table, size_t start, int64_t blocks) {
    Steps counters;
    counters.count = table.count;
    std::copy_n(&steps[start], table.count, counters.steps);
    o.factors = factors + start;
    launch(advance_kernel, (table.count + 31) / 32, 32, counters, o.skip, beta1, beta2, factors + start);
    if (blocks > 0) launch(adamw_ema_kernel, blocks, kThreads, table, o);
  });
}

// out = sum over all elements of all gradients of their squares; partials has one fp64 per chunk.
template <typename Launch>
void squares(const std::vector<Entry>& entries, double* partials, double* out, const Launch& launch) {
  int64_t done = 0;
  cut(entries, [&](const Table& table, size_t, int64_t blocks) {
    if (blocks > 0) launch(squares_kernel, blocks, kThreads, table, partials + done);
    done += blocks;
  });
  launch(sum_kernel, 1, kSumThreads, partials, done, out);
}

}  // namespace
