// AdamW, the moving average of the weights and their bf16 copies in one pass over memory, for many
// tensors at once; and the sum of squares of many tensors, for the global gradient norm.
//
// Per element 36 bytes with fp32 gradients and an average: gradient, parameter, both moments and the
// average are read, all but the gradient are written. Nothing is read back to the host.

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;
using Tensors = std::vector<Tensor>;

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
  __nv_bfloat16* ema_copy;                      // or null
  int64_t numel;
  int first_block;                              // of this launch
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

// The entry that block `block` works on: the last one that starts at or before it.
__device__ int find(const Table& table, int block) {
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.entries[middle].first_block <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

template <bool bf16>
__device__ float4 load_grad(const void* grad, int64_t i) {
  if constexpr (bf16) {
    const uint2 raw = __ldcs(reinterpret_cast<const uint2*>(static_cast<const __nv_bfloat16*>(grad) + i));
    const float2 low = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&raw.x));
    const float2 high = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&raw.y));
    return {low.x, low.y, high.x, high.y};
  } else {
    return __ldcs(reinterpret_cast<const float4*>(static_cast<const float*>(grad) + i));
  }
}

template <bool bf16>
__device__ float load_grad_one(const void* grad, int64_t i) {
  if constexpr (bf16) {
    return __bfloat162float(static_cast<const __nv_bfloat16*>(grad)[i]);
  } else {
    return static_cast<const float*>(grad)[i];
  }
}

__device__ void store_copy(__nv_bfloat16* copy, int64_t i, float4 value) {
  const __nv_bfloat162 low = __floats2bfloat162_rn(value.x, value.y);
  const __nv_bfloat162 high = __floats2bfloat162_rn(value.z, value.w);
  uint2 raw;
  raw.x = *reinterpret_cast<const unsigned*>(&low);
  raw.y = *reinterpret_cast<const unsigned*>(&high);
  __stcs(reinterpret_cast<uint2*>(copy + i), raw);
}

struct Rates {
  float lr, decay, scale, step_size, inverse_root, ema;
};

__device__ void update(float& p, float g, float& m, float& v, const Options& o, const Rates& r) {
  g *= r.scale;
  p -= r.decay * p;
  m += o.one_minus_beta1 * (g - m);
  v = o.beta2 * v + o.one_minus_beta2 * g * g;
  p -= r.step_size * m / (sqrtf(v) * r.inverse_root + o.eps);
}

template <bool bf16, bool averaged>
__device__ void update_chunk(const Entry& e, const Options& o, const Rates& r, int64_t start) {
  const int64_t end = min(start + kChunk, e.numel);
  const int64_t whole = e.aligned ? start + (end - start) / kVector * kVector : start;
  for (int64_t i = start + threadIdx.x * kVector; i < whole; i += kThreads * kVector) {
    const float4 g = load_grad<bf16>(e.grad, i);
    float4 p = __ldcs(reinterpret_cast<const float4*>(e.param + i));
    float4 m = __ldcs(reinterpret_cast<const float4*>(e.exp_avg + i));
    float4 v = __ldcs(reinterpret_cast<const float4*>(e.exp_avg_sq + i));
    float4 a;
    if constexpr (averaged) a = __ldcs(reinterpret_cast<const float4*>(e.ema + i));
    update(p.x, g.x, m.x, v.x, o, r);
    update(p.y, g.y, m.y, v.y, o, r);
    update(p.z, g.z, m.z, v.z, o, r);
    update(p.w, g.w, m.w, v.w, o, r);
    __stcs(reinterpret_cast<float4*>(e.param + i), p);
    __stcs(reinterpret_cast<float4*>(e.exp_avg + i), m);
    __stcs(reinterpret_cast<float4*>(e.exp_avg_sq + i), v);
    if (e.param_copy) store_copy(e.param_copy, i, p);
    if constexpr (averaged) {
      a.x += r.ema * (p.x - a.x);
      a.y += r.ema * (p.y - a.y);
      a.z += r.ema * (p.z - a.z);
      a.w += r.ema * (p.w - a.w);
      __stcs(reinterpret_cast<float4*>(e.ema + i), a);
      if (e.ema_copy) store_copy(e.ema_copy, i, a);
    }
  }
  for (int64_t i = whole + threadIdx.x; i < end; i += kThreads) {
    float p = e.param[i], m = e.exp_avg[i], v = e.exp_avg_sq[i];
    update(p, load_grad_one<bf16>(e.grad, i), m, v, o, r);
    e.param[i] = p;
    e.exp_avg[i] = m;
    e.exp_avg_sq[i] = v;
    if (e.param_copy) e.param_copy[i] = __float2bfloat16_rn(p);
    if constexpr (averaged) {
      const float a = e.ema[i] + r.ema * (p - e.ema[i]);
      e.ema[i] = a;
      if (e.ema_copy) e.ema_copy[i] = __float2bfloat16_rn(a);
    }
  }
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
  Rates r;
  r.lr = *o.lr;
  r.decay = r.lr * o.weight_decay;
  r.scale = *o.grad_scale;
  r.step_size = r.lr * factors.x;
  r.inverse_root = factors.y;
  r.ema = e.ema ? *o.ema_rate : 0.0f;
  const int64_t start = (blockIdx.x - e.first_block) * kChunk;
  if (e.bf16_grad) {
    e.ema ? update_chunk<true, true>(e, o, r, start) : update_chunk<true, false>(e, o, r, start);
  } else {
    e.ema ? update_chunk<false, true>(e, o, r, start) : update_chunk<false, false>(e, o, r, start);
  }
}

// Sum over a block, in the same order every time; valid in thread 0.
template <int threads>
__device__ double block_sum(double value) {
  __shared__ double of_warp[threads / 32];
  for (int offset = 16; offset; offset /= 2) value += __shfl_down_sync(~0u, value, offset);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  value = threadIdx.x < threads / 32 ? of_warp[threadIdx.x] : 0.0;
  if (threadIdx.x < 32) {
    for (int offset = 16; offset; offset /= 2) value += __shfl_down_sync(~0u, value, offset);
  }
  return value;
}

template <bool bf16>
__device__ float squares_of_chunk(const Entry& e, int64_t start) {
  const int64_t end = min(start + kChunk, e.numel);
  const int64_t whole = e.aligned ? start + (end - start) / kVector * kVector : start;
  float sum = 0.0f;
  for (int64_t i = start + threadIdx.x * kVector; i < whole; i += kThreads * kVector) {
    const float4 g = load_grad<bf16>(e.grad, i);
    sum += g.x * g.x + g.y * g.y + g.z * g.z + g.w * g.w;
  }
  for (int64_t i = whole + threadIdx.x; i < end; i += kThreads) {
    const float g = load_grad_one<bf16>(e.grad, i);
    sum += g * g;
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads)
    squares_kernel(const __grid_constant__ Table table, double* partials) {
  const Entry& e = table.entries[find(table, blockIdx.x)];
  const int64_t start = (blockIdx.x - e.first_block) * kChunk;
  const float mine = e.bf16_grad ? squares_of_chunk<true>(e, start) : squares_of_chunk<false>(e, start);
  const double sum = block_sum<kThreads>(mine);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(const double* partials, int64_t count, double* out) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) sum += partials[i];
  sum = block_sum<kSumThreads>(sum);
  if (threadIdx.x == 0) *out = sum;
}

void check(const char* op, const char* name, size_t i, const Tensor& tensor, int device, int64_t numel) {
  STD_TORCH_CHECK(tensor.is_cuda(), op, ": ", name, "[", i, "] is not on a CUDA device");
  STD_TORCH_CHECK(tensor.get_device() == device, op, ": ", name, "[", i, "] is on device ",
                  static_cast<int>(tensor.get_device()), ", expected ", device);
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, "[", i, "] is not contiguous");
  STD_TORCH_CHECK(tensor.numel() == numel, op, ": ", name, "[", i, "] has ", tensor.numel(),
                  " elements, expected ", numel);
}

void check_shape(const char* op, const char* name, size_t i, const Tensor& tensor, const Tensor& like) {
  bool same = tensor.dim() == like.dim();
  for (int64_t axis = 0; same && axis < like.dim(); ++axis) {
    same = tensor.size(axis) == like.size(axis);
  }
  STD_TORCH_CHECK(same, op, ": ", name, "[", i, "] has another shape than params[", i, "]");
}

void check_dtype(const char* op, const char* name, size_t i, const Tensor& tensor, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, op, ": ", name, "[", i,
                  "] has another dtype than expected (fp32; bf16 for gradients and copies, fp64 for sums)");
}

void check_length(const char* op, const char* name, const Tensors& list, size_t expected) {
  STD_TORCH_CHECK(list.size() == expected, op, ": ", name, " has ", list.size(),
                  " tensors, expected ", expected);
}

bool is_aligned(const void* pointer, int bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Pointer to element data; null where the list is empty, which means that it is not wanted.
template <typename T>
T* pointer(const char* op, const char* name, const Tensors& list, size_t i, ScalarType dtype, const Tensor& like) {
  if (list.empty()) return nullptr;
  check(op, name, i, list[i], like.get_device(), like.numel());
  check_shape(op, name, i, list[i], like);
  check_dtype(op, name, i, list[i], dtype);
  return static_cast<T*>(list[i].data_ptr());
}

void fill_grad(const char* op, Entry& entry, const Tensor& grad, size_t i) {
  entry.bf16_grad = grad.scalar_type() == ScalarType::BFloat16;
  if (!entry.bf16_grad) check_dtype(op, "grads", i, grad, ScalarType::Float);
  entry.grad = grad.data_ptr();
  entry.aligned = is_aligned(entry.grad, entry.bf16_grad ? 8 : 16);
}

void adamw_ema(
    Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors steps, Tensors emas,
    Tensors param_copies, Tensors ema_copies, Tensor lr, Tensor grad_scale, Tensor skip,
    std::optional<Tensor> ema_rate, Tensor factors, double beta1, double beta2, double eps, double weight_decay) {
  const char* op = "adamw_ema";
  const size_t total = params.size();
  if (total == 0) return;
  STD_TORCH_CHECK(params[0].is_cuda(), op, ": params[0] is not on a CUDA device");
  const int device = params[0].get_device();
  check_length(op, "grads", grads, total);
  check_length(op, "exp_avgs", exp_avgs, total);
  check_length(op, "exp_avg_sqs", exp_avg_sqs, total);
  check_length(op, "steps", steps, total);
  if (!emas.empty()) check_length(op, "emas", emas, total);
  if (!param_copies.empty()) check_length(op, "param_copies", param_copies, total);
  if (!ema_copies.empty()) check_length(op, "ema_copies", ema_copies, total);
  STD_TORCH_CHECK(ema_copies.empty() || !emas.empty(), op, ": ema_copies without emas");
  STD_TORCH_CHECK(emas.empty() || ema_rate.has_value(), op, ": emas without ema_rate");
  const Tensor* scalars[] = {&lr, &grad_scale, &skip, ema_rate.has_value() ? &*ema_rate : nullptr};
  const char* names[] = {"lr", "grad_scale", "skip", "ema_rate"};
  for (int i = 0; i < 4; ++i) {
    if (!scalars[i]) continue;
    check(op, names[i], 0, *scalars[i], device, 1);
    check_dtype(op, names[i], 0, *scalars[i], ScalarType::Float);
  }
  check(op, "factors", 0, factors, device, static_cast<int64_t>(2 * total));
  check_dtype(op, "factors", 0, factors, ScalarType::Float);

  torch::stable::accelerator::DeviceGuard guard(device);
  cudaStream_t stream = current_stream(device);
  Options options;
  options.lr = static_cast<const float*>(lr.data_ptr());
  options.grad_scale = static_cast<const float*>(grad_scale.data_ptr());
  options.skip = static_cast<const float*>(skip.data_ptr());
  options.ema_rate = ema_rate.has_value() ? static_cast<const float*>(ema_rate->data_ptr()) : nullptr;
  options.beta1 = static_cast<float>(beta1);
  options.beta2 = static_cast<float>(beta2);
  options.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  options.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  options.eps = static_cast<float>(eps);
  options.weight_decay = static_cast<float>(weight_decay);

  Table table;
  Steps counters;
  for (size_t start = 0; start < total; start += kTensors) {
    const size_t end = start + kTensors < total ? start + kTensors : total;
    int64_t blocks = 0;
    table.count = counters.count = static_cast<int>(end - start);
    for (size_t i = start; i < end; ++i) {
      Entry& e = table.entries[i - start];
      const Tensor& p = params[i];
      check(op, "params", i, p, device, p.numel());
      check_dtype(op, "params", i, p, ScalarType::Float);
      check(op, "grads", i, grads[i], device, p.numel());
      check_shape(op, "grads", i, grads[i], p);
      check(op, "steps", i, steps[i], device, 1);
      check_dtype(op, "steps", i, steps[i], ScalarType::Float);
      fill_grad(op, e, grads[i], i);
      e.param = static_cast<float*>(p.data_ptr());
      e.exp_avg = pointer<float>(op, "exp_avgs", exp_avgs, i, ScalarType::Float, p);
      e.exp_avg_sq = pointer<float>(op, "exp_avg_sqs", exp_avg_sqs, i, ScalarType::Float, p);
      e.ema = pointer<float>(op, "emas", emas, i, ScalarType::Float, p);
      e.param_copy = pointer<__nv_bfloat16>(op, "param_copies", param_copies, i, ScalarType::BFloat16, p);
      e.ema_copy = pointer<__nv_bfloat16>(op, "ema_copies", ema_copies, i, ScalarType::BFloat16, p);
      e.aligned = e.aligned && is_aligned(e.param, 16) && is_aligned(e.exp_avg, 16) &&
                  is_aligned(e.exp_avg_sq, 16) && is_aligned(e.ema, 16) &&
                  is_aligned(e.param_copy, 8) && is_aligned(e.ema_copy, 8);
      e.numel = p.numel();
      e.first_block = static_cast<int>(blocks);
      blocks += (e.numel + kChunk - 1) / kChunk;
      counters.steps[i - start] = static_cast<float*>(steps[i].data_ptr());
    }
    STD_TORCH_CHECK(blocks <= INT32_MAX, op, ": ", blocks, " blocks in one launch");
    float2* of_launch = static_cast<float2*>(factors.data_ptr()) + start;
    options.factors = of_launch;
    advance_kernel<<<(counters.count + 31) / 32, 32, 0, stream>>>(
        counters, options.skip, beta1, beta2, of_launch);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    if (blocks > 0) {
      adamw_ema_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(table, options);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }
}

// out = sum over all elements of all tensors of their squares; partials has one fp64 per chunk.
void sum_of_squares(Tensors grads, Tensor partials, Tensor out) {
  const char* op = "sum_of_squares";
  STD_TORCH_CHECK(out.is_cuda(), op, ": out is not on a CUDA device");
  const int device = out.get_device();
  int64_t chunks = 0;
  for (const Tensor& grad : grads) chunks += (grad.numel() + kChunk - 1) / kChunk;
  check(op, "out", 0, out, device, 1);
  check_dtype(op, "out", 0, out, ScalarType::Double);
  check(op, "partials", 0, partials, device, chunks);
  check_dtype(op, "partials", 0, partials, ScalarType::Double);

  torch::stable::accelerator::DeviceGuard guard(device);
  cudaStream_t stream = current_stream(device);
  double* target = static_cast<double*>(partials.data_ptr());
  Table table;
  for (size_t start = 0; start < grads.size(); start += kTensors) {
    const size_t end = start + kTensors < grads.size() ? start + kTensors : grads.size();
    int64_t blocks = 0;
    table.count = static_cast<int>(end - start);
    for (size_t i = start; i < end; ++i) {
      Entry& e = table.entries[i - start];
      check(op, "grads", i, grads[i], device, grads[i].numel());
      fill_grad(op, e, grads[i], i);
      e.numel = grads[i].numel();
      e.first_block = static_cast<int>(blocks);
      blocks += (e.numel + kChunk - 1) / kChunk;
    }
    STD_TORCH_CHECK(blocks <= INT32_MAX, op, ": ", blocks, " blocks in one launch");
    if (blocks > 0) {
      squares_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(table, target);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    target += blocks;
  }
  sum_kernel<<<1, kSumThreads, 0, stream>>>(
      static_cast<const double*>(partials.data_ptr()), chunks, static_cast<double*>(out.data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(repa_fast, m) {
  m.def(
      "adamw_ema(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
      " Tensor(d!)[] steps, Tensor(e!)[] emas, Tensor(f!)[] param_copies, Tensor(g!)[] ema_copies,"
      " Tensor lr, Tensor grad_scale, Tensor skip, Tensor? ema_rate, Tensor(h!) factors,"
      " float beta1, float beta2, float eps, float weight_decay) -> ()");
  m.def("sum_of_squares(Tensor[] grads, Tensor(a!) partials, Tensor(b!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(repa_fast, CompositeExplicitAutograd, m) {
  m.impl("adamw_ema", TORCH_BOX(&adamw_ema));
  m.impl("sum_of_squares", TORCH_BOX(&sum_of_squares));
}
