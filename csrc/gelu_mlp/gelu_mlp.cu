// gelu(x W1^T + b1) W2^T + b2 and its gradients as six products of cuBLASLt, whose epilogues add
// biases, apply GELU (its tanh form) and its derivative, and sum columns for the bias gradients.
//
// cuBLASLt is column-major: a contiguous (r, c) tensor is to it a c x r matrix with leading dimension
// c. Every product below is written in its terms; F and D being multiples of 8, all leading dimensions
// keep rows at 16 bytes; the number of rows M of x is never a leading dimension.
//
// Everything is enqueued on the current stream; nothing is allocated but, once per device, a handle.

#include <cublasLt.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>

namespace {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

constexpr int kAlignment = 16;                  // bytes, of every pointer
constexpr int kMaxAlignment = 256;              // more is of no use to cuBLASLt

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)
constexpr const char* kLibrary = "libcublasLt.so." TEXT(CUBLAS_VER_MAJOR);

// The functions that are used, of the library that torch has loaded. Not linked: a torch with another
// major version of CUDA would then not load the other operators of this file either.
struct CublasLt {
  decltype(&cublasLtCreate) create;
  decltype(&cublasLtGetStatusString) status_string;
  decltype(&cublasLtMatmul) matmul;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic;
  decltype(&cublasLtMatmulDescCreate) desc_create;
  decltype(&cublasLtMatmulDescDestroy) desc_destroy;
  decltype(&cublasLtMatmulDescSetAttribute) desc_set;
  decltype(&cublasLtMatrixLayoutCreate) layout_create;
  decltype(&cublasLtMatrixLayoutDestroy) layout_destroy;
  decltype(&cublasLtMatmulPreferenceCreate) preference_create;
  decltype(&cublasLtMatmulPreferenceDestroy) preference_destroy;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set;
  std::string why_not;                          // empty: all of them are there
};

template <typename Function>
void find(CublasLt& lib, void* handle, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(handle, name));
  if (!function && lib.why_not.empty()) {
    lib.why_not = std::string(kLibrary) + " has no " + name;
  }
}

CublasLt load() {
  CublasLt lib{};
  void* handle = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (!handle) {
    const char* error = dlerror();
    lib.why_not = std::string(kLibrary) + " does not load: " + (error ? error : "no reason given");
    return lib;
  }
  find(lib, handle, "cublasLtCreate", lib.create);
  find(lib, handle, "cublasLtGetStatusString", lib.status_string);
  find(lib, handle, "cublasLtMatmul", lib.matmul);
  find(lib, handle, "cublasLtMatmulAlgoGetHeuristic", lib.heuristic);
  find(lib, handle, "cublasLtMatmulDescCreate", lib.desc_create);
  find(lib, handle, "cublasLtMatmulDescDestroy", lib.desc_destroy);
  find(lib, handle, "cublasLtMatmulDescSetAttribute", lib.desc_set);
  find(lib, handle, "cublasLtMatrixLayoutCreate", lib.layout_create);
  find(lib, handle, "cublasLtMatrixLayoutDestroy", lib.layout_destroy);
  find(lib, handle, "cublasLtMatmulPreferenceCreate", lib.preference_create);
  find(lib, handle, "cublasLtMatmulPreferenceDestroy", lib.preference_destroy);
  find(lib, handle, "cublasLtMatmulPreferenceSetAttribute", lib.preference_set);
  return lib;
}

const CublasLt& lt() {
  static const CublasLt lib = load();
  return lib;
}

struct Matrix {
  void* data;
  int64_t rows, columns;                        // column-major and packed: rows is the leading dimension
  cudaDataType_t type;
};

// D = epilogue(op(A) op(B)), products and sums in fp32.
struct Product {
  const char* name;                             // for messages
  Matrix a, b, d;
  cublasOperation_t op_a, op_b;
  cublasLtEpilogue_t epilogue;
  void* bias = nullptr;                         // bias or its gradient, as the epilogue has it
  void* aux = nullptr;                          // GELU's argument, laid out as D

  int64_t inner() const { return op_a == CUBLAS_OP_N ? a.columns : a.rows; }
};

struct Scratch {
  int device;
  void* workspace;
  uint64_t bytes;
  cudaStream_t stream;
};

void check(cublasStatus_t status, const char* call, const Product& p) {
  STD_TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "gelu_mlp: ", call, " failed for ", p.name, ", ",
                  p.d.rows, " x ", p.d.columns, " x ", p.inner(), " (m x n x k): ",
                  lt().status_string(status));
}

using Desc = std::unique_ptr<std::remove_pointer_t<cublasLtMatmulDesc_t>, decltype(&cublasLtMatmulDescDestroy)>;
using Layout =
    std::unique_ptr<std::remove_pointer_t<cublasLtMatrixLayout_t>, decltype(&cublasLtMatrixLayoutDestroy)>;
using Preference = std::unique_ptr<std::remove_pointer_t<cublasLtMatmulPreference_t>,
                                   decltype(&cublasLtMatmulPreferenceDestroy)>;

template <typename T>
void set(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t name, T value, const Product& p) {
  check(lt().desc_set(desc, name, &value, sizeof(value)), "cublasLtMatmulDescSetAttribute", p);
}

template <typename T>
void set(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t name, T value,
         const Product& p) {
  check(lt().preference_set(preference, name, &value, sizeof(value)),
        "cublasLtMatmulPreferenceSetAttribute", p);
}

// The pointers of the epilogue are part of it: the heuristic reads their alignment off them.
Desc describe(const Product& p) {
  cublasLtMatmulDesc_t raw = nullptr;
  check(lt().desc_create(&raw, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescCreate", p);
  Desc desc(raw, lt().desc_destroy);
  set<int32_t>(raw, CUBLASLT_MATMUL_DESC_TRANSA, p.op_a, p);
  set<int32_t>(raw, CUBLASLT_MATMUL_DESC_TRANSB, p.op_b, p);
  set<uint32_t>(raw, CUBLASLT_MATMUL_DESC_EPILOGUE, p.epilogue, p);
  if (p.bias) set<void*>(raw, CUBLASLT_MATMUL_DESC_BIAS_POINTER, p.bias, p);
  if (p.aux) {
    set<void*>(raw, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, p.aux, p);
    set<int64_t>(raw, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, p.d.rows, p);
  }
  return desc;
}

Layout lay_out(const Matrix& m, const Product& p) {
  cublasLtMatrixLayout_t raw = nullptr;
  check(lt().layout_create(&raw, m.type, static_cast<uint64_t>(m.rows), static_cast<uint64_t>(m.columns),
                           m.rows),
        "cublasLtMatrixLayoutCreate", p);
  return Layout(raw, lt().layout_destroy);
}

int alignment(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  int bytes = kMaxAlignment;
  while (address % bytes) bytes /= 2;
  return bytes;
}

// cuBLASLt's first choice for a product; partial sums of a split product stay in fp32.
cublasLtMatmulAlgo_t choose(cublasLtHandle_t handle, const Product& p, uint64_t workspace_bytes,
                            cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                            cublasLtMatrixLayout_t d) {
  cublasLtMatmulPreference_t raw = nullptr;
  check(lt().preference_create(&raw), "cublasLtMatmulPreferenceCreate", p);
  Preference preference(raw, lt().preference_destroy);
  set<uint64_t>(raw, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace_bytes, p);
  set<uint32_t>(raw, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE, p);
  set<uint32_t>(raw, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(p.a.data), p);
  set<uint32_t>(raw, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(p.b.data), p);
  set<uint32_t>(raw, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment(p.d.data), p);
  set<uint32_t>(raw, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(p.d.data), p);
  cublasLtMatmulHeuristicResult_t result{};
  int found = 0;
  check(lt().heuristic(handle, desc, a, b, d, d, raw, 1, &result, &found),
        "cublasLtMatmulAlgoGetHeuristic", p);
  check(found ? result.state : CUBLAS_STATUS_NOT_SUPPORTED, "cublasLtMatmulAlgoGetHeuristic", p);
  return result.algo;
}

// Handles and choices live as long as the process: destroying a handle synchronises its device.
std::mutex mutex;

cublasLtHandle_t handle_of(int device, const Product& p) {
  static auto& handles = *new std::map<int, cublasLtHandle_t>;
  const std::lock_guard<std::mutex> lock(mutex);
  cublasLtHandle_t& handle = handles[device];
  if (!handle) check(lt().create(&handle), "cublasLtCreate", p);
  return handle;
}

void multiply(const Product& p, const Scratch& scratch) {
  using Key = std::array<int64_t, 14>;
  static auto& choices = *new std::map<Key, cublasLtMatmulAlgo_t>;
  const Key key = {scratch.device, p.d.rows, p.d.columns, p.inner(), p.op_a, p.op_b, p.d.type, p.epilogue,
                   alignment(p.a.data), alignment(p.b.data), alignment(p.d.data), alignment(p.bias),
                   alignment(p.aux), static_cast<int64_t>(scratch.bytes)};
  const cublasLtHandle_t handle = handle_of(scratch.device, p);
  const Desc desc = describe(p);
  const Layout a = lay_out(p.a, p), b = lay_out(p.b, p), d = lay_out(p.d, p);
  cublasLtMatmulAlgo_t algo;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    auto known = choices.find(key);
    if (known == choices.end()) {
      known = choices.emplace(key, choose(handle, p, scratch.bytes, desc.get(), a.get(), b.get(), d.get())).first;
    }
    algo = known->second;
  }
  const float one = 1.0f, zero = 0.0f;
  check(lt().matmul(handle, desc.get(), &one, p.a.data, a.get(), p.b.data, b.get(), &zero, p.d.data, d.get(),
                    p.d.data, d.get(), &algo, scratch.workspace, scratch.bytes, scratch.stream),
        "cublasLtMatmul", p);
}

cudaDataType_t type_of(ScalarType dtype) {
  return dtype == ScalarType::Float ? CUDA_R_32F : CUDA_R_16BF;
}

// Contiguous (..., width) with `rows` rows, bf16 or, where a gradient of a weight may be, fp32.
Matrix matrix(const char* name, const Tensor& t, int device, int64_t rows, int64_t width, bool fp32 = false) {
  STD_TORCH_CHECK(t.is_cuda(), "gelu_mlp: ", name, " is not on a CUDA device");
  STD_TORCH_CHECK(t.get_device() == device, "gelu_mlp: ", name, " is on device ",
                  static_cast<int>(t.get_device()), ", expected ", device);
  STD_TORCH_CHECK(t.is_contiguous(), "gelu_mlp: ", name, " is not contiguous");
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || (fp32 && dtype == ScalarType::Float), "gelu_mlp: ", name,
                  " has another dtype than expected: bf16", fp32 ? " or fp32" : "");
  const bool fits = t.dim() > 0 && t.size(t.dim() - 1) == width && t.numel() == rows * width;
  STD_TORCH_CHECK(fits, "gelu_mlp: ", name, " is not ", rows, " x ", width);
  STD_TORCH_CHECK(alignment(t.data_ptr()) >= kAlignment, "gelu_mlp: ", name, " does not begin at a multiple of ",
                  kAlignment, " bytes");
  return {t.data_ptr(), width, rows, type_of(dtype)};
}

// The sizes and where to compute; x (..., D) and weight1 (F, D).
struct Problem {
  int64_t rows, width, hidden;
  Scratch scratch;
};

Problem problem_of(const Tensor& x, const Tensor& weight1, const Tensor& workspace) {
  STD_TORCH_CHECK(lt().why_not.empty(), "gelu_mlp: ", lt().why_not);
  STD_TORCH_CHECK(x.is_cuda(), "gelu_mlp: x is not on a CUDA device");
  STD_TORCH_CHECK(x.dim() > 0 && weight1.dim() == 2, "gelu_mlp: x has ", x.dim(), " axes and weight1 ",
                  weight1.dim(), ", expected at least 1, and 2");
  Problem p;
  p.hidden = weight1.size(0);
  p.width = weight1.size(1);
  STD_TORCH_CHECK(p.width > 0 && p.hidden > 0 && x.numel() > 0, "gelu_mlp: x or weight1 is empty");
  STD_TORCH_CHECK(p.width % 8 == 0 && p.hidden % 8 == 0, "gelu_mlp: widths are ", p.width, " and ", p.hidden,
                  ", expected multiples of 8");
  p.rows = x.numel() / p.width;
  const int device = x.get_device();
  STD_TORCH_CHECK(workspace.is_cuda() && workspace.get_device() == device && workspace.is_contiguous() &&
                      workspace.scalar_type() == ScalarType::Byte,
                  "gelu_mlp: workspace is not contiguous uint8 on device ", device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  p.scratch = {device, workspace.data_ptr(), static_cast<uint64_t>(workspace.numel()),
               static_cast<cudaStream_t>(stream)};
  return p;
}

constexpr cublasOperation_t N = CUBLAS_OP_N, T = CUBLAS_OP_T;

void gelu_mlp_forward_into(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, Tensor pre,
                           Tensor hidden, Tensor y, Tensor workspace) {
  const Problem p = problem_of(x, weight1, workspace);
  const int device = p.scratch.device;
  const Matrix in = matrix("x", x, device, p.rows, p.width);
  const Matrix w1 = matrix("weight1", weight1, device, p.hidden, p.width);
  const Matrix b1 = matrix("bias1", bias1, device, 1, p.hidden);
  const Matrix w2 = matrix("weight2", weight2, device, p.width, p.hidden);
  const Matrix b2 = matrix("bias2", bias2, device, 1, p.width);
  const Matrix u = matrix("pre", pre, device, p.rows, p.hidden);
  const Matrix h = matrix("hidden", hidden, device, p.rows, p.hidden);
  const Matrix out = matrix("y", y, device, p.rows, p.width);
  torch::stable::accelerator::DeviceGuard guard(device);

  Product first{"hidden", w1, in, h, T, N, CUBLASLT_EPILOGUE_GELU_AUX_BIAS};
  first.bias = b1.data;
  first.aux = u.data;
  multiply(first, p.scratch);
  Product second{"y", w2, h, out, T, N, CUBLASLT_EPILOGUE_BIAS};
  second.bias = b2.data;
  multiply(second, p.scratch);
}

void gelu_mlp_backward_into(Tensor dy, Tensor x, Tensor pre, Tensor hidden, Tensor weight1, Tensor weight2,
                            Tensor dpre, Tensor dx, Tensor dweight1, Tensor dbias1, Tensor dweight2, Tensor dbias2,
                            Tensor workspace) {
  const Problem p = problem_of(x, weight1, workspace);
  const int device = p.scratch.device;
  const Matrix dout = matrix("dy", dy, device, p.rows, p.width);
  const Matrix in = matrix("x", x, device, p.rows, p.width);
  const Matrix u = matrix("pre", pre, device, p.rows, p.hidden);
  const Matrix h = matrix("hidden", hidden, device, p.rows, p.hidden);
  const Matrix w1 = matrix("weight1", weight1, device, p.hidden, p.width);
  const Matrix w2 = matrix("weight2", weight2, device, p.width, p.hidden);
  const Matrix du = matrix("dpre", dpre, device, p.rows, p.hidden);
  const Matrix din = matrix("dx", dx, device, p.rows, p.width);
  const Matrix dw1 = matrix("dweight1", dweight1, device, p.hidden, p.width, true);
  const Matrix dw2 = matrix("dweight2", dweight2, device, p.width, p.hidden, true);
  const Matrix db1 = matrix("dbias1", dbias1, device, 1, p.hidden);
  const Matrix db2 = matrix("dbias2", dbias2, device, 1, p.width, true);
  // A bias gradient has the type of the product's result.
  STD_TORCH_CHECK(db2.type == dw2.type, "gelu_mlp: dbias2 has another dtype than dweight2");
  torch::stable::accelerator::DeviceGuard guard(device);

  Product of_pre{"dpre", w2, dout, du, N, N, CUBLASLT_EPILOGUE_DGELU_BGRAD};
  of_pre.bias = db1.data;
  of_pre.aux = u.data;
  multiply(of_pre, p.scratch);
  Product of_weight2{"dweight2", h, dout, dw2, N, T, CUBLASLT_EPILOGUE_BGRADB};
  of_weight2.bias = db2.data;
  multiply(of_weight2, p.scratch);
  multiply({"dweight1", in, du, dw1, N, T, CUBLASLT_EPILOGUE_DEFAULT}, p.scratch);
  multiply({"dx", w1, du, din, N, N, CUBLASLT_EPILOGUE_DEFAULT}, p.scratch);
}

// Why the operators cannot run in this process, "" if they can.
std::string gelu_mlp_why_not() { return lt().why_not; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(repa_fast, m) {
  m.def(
      "gelu_mlp_forward_into(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2,"
      " Tensor(a!) pre, Tensor(b!) hidden, Tensor(c!) y, Tensor(d!) workspace) -> ()");
  m.def(
      "gelu_mlp_backward_into(Tensor dy, Tensor x, Tensor pre, Tensor hidden, Tensor weight1, Tensor weight2,"
      " Tensor(a!) dpre, Tensor(b!) dx, Tensor(c!) dweight1, Tensor(d!) dbias1, Tensor(e!) dweight2,"
      " Tensor(f!) dbias2, Tensor(g!) workspace) -> ()");
  m.def("gelu_mlp_why_not() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(repa_fast, CompositeExplicitAutograd, m) {
  m.impl("gelu_mlp_forward_into", TORCH_BOX(&gelu_mlp_forward_into));
  m.impl("gelu_mlp_backward_into", TORCH_BOX(&gelu_mlp_backward_into));
  m.impl("gelu_mlp_why_not", TORCH_BOX(&gelu_mlp_why_not));
}
