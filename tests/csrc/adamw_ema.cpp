// PROGRAM OPERATOR FAULT: reads the arguments of an operator of csrc/adamw_ema, runs its kernels with blocks, warps
// and lanes in a drawn order and once more with the last first, and writes what they wrote.

#include <cuda_bf16.h>

[[maybe_unused]] static int planted;            // number of the fault, of those that a test writes into the header

#include "kernels.cuh"

using Bytes = std::vector<char>;

struct Input {
  const char* at;

  template <typename T>
  T take() {
    T found;
    memcpy(&found, at, sizeof(T));
    at += sizeof(T);
    return found;
  }
};

// Memory as a tensor has it: `front` bytes behind a multiple of 16, and ended by its last element.
class Buffer {
 public:
  // NaN to begin with.
  explicit Buffer(int64_t size, int64_t front = 0) : size_(size), front_(front), memory_(front + size, '\xff') {}

  // Of the input: its size in bytes, the front, and the bytes themselves.
  static Buffer read(Input& input) {
    const auto size = input.take<int64_t>(), front = input.take<int64_t>();
    Buffer found(size, front);
    std::copy_n(input.at, size, found.memory_.begin() + front);
    input.at += size;
    return found;
  }

  // Null where there are no bytes, as torch has it.
  template <typename T>
  T* data() const { return size_ ? reinterpret_cast<T*>(const_cast<char*>(memory_.data()) + front_) : nullptr; }

  void append_to(Bytes& output) const {
    const bool kept = std::count(memory_.begin(), memory_.begin() + front_, '\xff') == front_;
    if (!kept) cuda_on_cpu::fail("wrote before a tensor");
    output.insert(output.end(), memory_.begin() + front_, memory_.end());
  }

 private:
  int64_t size_, front_;
  Bytes memory_;
};

static Bytes run_step(Input input, cuda_on_cpu::Order order) {
  const auto beta1 = input.take<double>(), beta2 = input.take<double>();
  const auto eps = input.take<double>(), weight_decay = input.take<double>();
  std::vector<Buffer> scalars, tensors;
  for (int i = 0; i < 4; ++i) scalars.push_back(Buffer::read(input));
  const auto count = input.take<int64_t>();
  const Buffer factors(count * sizeof(float2));
  std::vector<Entry> entries(count);
  std::vector<float*> counts(count);
  for (int64_t i = 0; i < count; ++i) {
    Entry& e = entries[i];
    e.numel = input.take<int64_t>();
    e.bf16_grad = input.take<int64_t>();
    for (int k = 0; k < 7; ++k) tensors.push_back(Buffer::read(input));
    const Buffer* of = &tensors[7 * i];
    e.param = of[0].data<float>();
    e.grad = of[1].data<void>();
    e.exp_avg = of[2].data<float>();
    e.exp_avg_sq = of[3].data<float>();
    counts[i] = of[4].data<float>();
    e.ema = of[5].data<float>();
    e.param_copy = of[6].data<__nv_bfloat16>();
  }
  const Options options = {
      scalars[0].data<float>(), scalars[1].data<float>(), scalars[2].data<float>(), scalars[3].data<float>()};
  step(entries, counts, options, factors.data<float2>(), beta1, beta2, eps, weight_decay, cuda_on_cpu::Launch{order});
  Bytes output;
  for (const Buffer& buffer : tensors) buffer.append_to(output);
  return output;
}

static Bytes run_squares(Input input, cuda_on_cpu::Order order) {
  const auto count = input.take<int64_t>();
  std::vector<Buffer> tensors;
  std::vector<Entry> entries(count);
  int64_t blocks = 0;
  for (Entry& e : entries) {
    e.numel = input.take<int64_t>();
    e.bf16_grad = input.take<int64_t>();
    tensors.push_back(Buffer::read(input));
    e.grad = tensors.back().data<void>();
    blocks += chunks(e.numel);
  }
  const Buffer partials(blocks * sizeof(double)), out(sizeof(double));
  squares(entries, partials.data<double>(), out.data<double>(), cuda_on_cpu::Launch{order});
  Bytes output;
  out.append_to(output);
  return output;
}

int main(int, char** argv) {
  planted = atoi(argv[2]);
  Bytes input, part(1 << 20);
  while (const size_t size = fread(part.data(), 1, part.size(), stdin)) {
    input.insert(input.end(), part.begin(), part.begin() + size);
  }
  const auto run = *argv[1] == 'a' ? run_step : run_squares;
  const Bytes output = run({input.data()}, cuda_on_cpu::Order(1));
  if (output != run({input.data()}, cuda_on_cpu::Order(0))) cuda_on_cpu::fail("the result depends on the order");
  fwrite(output.data(), 1, output.size(), stdout);
}
