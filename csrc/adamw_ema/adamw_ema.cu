// AdamW, bf16 copies of the weights and their EMA in one pass over memory, for many tensors at
// once; and the sum of squares of many tensors, for the global gradient norm.

#include "kernels.cuh"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;
using Tensors = std::vector<Tensor>;
using Copies = std::vector<std::optional<Tensor>>;

const Tensor* address(const Tensor& tensor) { return &tensor; }
const Tensor* address(const std::optional<Tensor>& tensor) { return tensor ? &*tensor : nullptr; }

// An operator, and what its tensors have to be.
struct Checked {
  const char* op;
  int device;
  size_t count;                                 // of tensors in a list

  // list[i]; null where an optional list is empty or has none there.
  template <typename List>
  const Tensor* at(const char* name, const List& list, size_t i, bool optional = false) const {
    if (optional && list.empty()) return nullptr;
    STD_TORCH_CHECK(list.size() == count, op, ": ", name, " has ", list.size(), " tensors, expected ", count);
    return address(list[i]);
  }

  // Pointer to the elements of a tensor; null if there is none.
  template <typename T>
  T* data(const char* name, size_t i, const Tensor* tensor, int64_t numel) const {
    constexpr ScalarType dtype = std::is_same_v<T, float> ? ScalarType::Float
                                 : std::is_same_v<T, double> ? ScalarType::Double : ScalarType::BFloat16;
    if (!tensor) return nullptr;
    STD_TORCH_CHECK(tensor->is_cuda(), op, ": ", name, "[", i, "] is not on a CUDA device");
    STD_TORCH_CHECK(tensor->get_device() == device, op, ": ", name, "[", i, "] is on device ",
                    static_cast<int>(tensor->get_device()), ", expected ", device);
    STD_TORCH_CHECK(tensor->is_contiguous(), op, ": ", name, "[", i, "] is not contiguous");
    STD_TORCH_CHECK(tensor->numel() == numel, op, ": ", name, "[", i, "] has ", tensor->numel(),
                    " elements, expected ", numel);
    STD_TORCH_CHECK(tensor->scalar_type() == dtype, op, ": ", name, "[", i,
                    "] has another dtype than expected (fp32; bf16 for gradients and copies, fp64 for sums)");
    return static_cast<T*>(tensor->data_ptr());
  }

  // The same of list[i], which has the shape of `param`.
  template <typename T, typename List>
  T* like(const Tensor& param, const char* name, const List& list, size_t i, bool optional = false) const {
    const Tensor* tensor = at(name, list, i, optional);
    T* found = data<T>(name, i, tensor, param.numel());
    STD_TORCH_CHECK(!tensor || tensor->sizes().equals(param.sizes()), op, ": ", name, "[", i,
                    "] has another shape than params[", i, "]");
    return found;
  }

  void set_grad(Entry& e, const Tensor& param, const Tensors& grads, size_t i) const {
    e.numel = param.numel();
    e.bf16_grad = at("grads", grads, i)->scalar_type() == ScalarType::BFloat16;
    if (e.bf16_grad) e.grad = like<__nv_bfloat16>(param, "grads", grads, i);
    else e.grad = like<float>(param, "grads", grads, i);
  }
};

// Starts kernels on the current stream of a device.
struct Launch {
  explicit Launch(int device) : guard(device) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  }

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, const Arguments&... arguments) const {
    kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
};

void adamw_ema(
    Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors steps, Tensors emas,
    Copies param_copies, Tensor lr, Tensor grad_scale, Tensor skip, std::optional<Tensor> ema_rate, Tensor factors,
    double beta1, double beta2, double eps, double weight_decay) {
  const size_t total = params.size();
  if (total == 0) return;
  const Checked checked = {"adamw_ema", params[0].get_device(), total};
  std::vector<Entry> entries(total);
  std::vector<float*> counts(total);
  for (size_t i = 0; i < total; ++i) {
    Entry& e = entries[i];
    const Tensor& p = params[i];
    e.param = checked.like<float>(p, "params", params, i);
    checked.set_grad(e, p, grads, i);
    e.exp_avg = checked.like<float>(p, "exp_avgs", exp_avgs, i);
    e.exp_avg_sq = checked.like<float>(p, "exp_avg_sqs", exp_avg_sqs, i);
    e.ema = checked.like<float>(p, "emas", emas, i, true);
    e.param_copy = checked.like<__nv_bfloat16>(p, "param_copies", param_copies, i, true);
    counts[i] = checked.data<float>("steps", i, checked.at("steps", steps, i), 1);
  }
  STD_TORCH_CHECK(emas.empty() || ema_rate.has_value(), "adamw_ema: emas without ema_rate");
  const Options options = {
      checked.data<float>("lr", 0, &lr, 1), checked.data<float>("grad_scale", 0, &grad_scale, 1),
      checked.data<float>("skip", 0, &skip, 1), checked.data<float>("ema_rate", 0, address(ema_rate), 1)};
  float* pairs = checked.data<float>("factors", 0, &factors, static_cast<int64_t>(2 * total));
  step(entries, counts, options, reinterpret_cast<float2*>(pairs), beta1, beta2, eps, weight_decay,
       Launch(checked.device));
}

void sum_of_squares(Tensors grads, Tensor partials, Tensor out) {
  STD_TORCH_CHECK(out.is_cuda(), "sum_of_squares: out is not on a CUDA device");
  const Checked checked = {"sum_of_squares", out.get_device(), grads.size()};
  double* sum = checked.data<double>("out", 0, &out, 1);
  std::vector<Entry> entries(grads.size());
  int64_t blocks = 0;
  for (size_t i = 0; i < grads.size(); ++i) {
    checked.set_grad(entries[i], grads[i], grads, i);
    blocks += chunks(entries[i].numel);
  }
  squares(entries, checked.data<double>("partials", 0, &partials, blocks), sum, Launch(checked.device));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(repa_fast, m) {
  m.def(
      "adamw_ema(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
      " Tensor(d!)[] steps, Tensor(e!)[] emas, Tensor(f!)?[] param_copies, Tensor lr,"
      " Tensor grad_scale, Tensor skip, Tensor? ema_rate, Tensor(g!) factors,"
      " float beta1, float beta2, float eps, float weight_decay) -> ()");
  m.def("sum_of_squares(Tensor[] grads, Tensor(a!) partials, Tensor(b!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(repa_fast, CompositeExplicitAutograd, m) {
  m.impl("adamw_ema", TORCH_BOX(&adamw_ema));
  m.impl("sum_of_squares", TORCH_BOX(&sum_of_squares));
}
