// What the project's launchers would launch for each case of the table, found out without a GPU.
//
// This is compiled against the project's own headers and linked with its own objects of csrc/cuda/*.cu. The
// few functions of the CUDA runtime that those call are imitated below; instead of launching a kernel they
// note its name, its block and its arguments. So which kernel is taken, and how wide, is decided by the
// project.
//
// Prints one JSON object a line. A case is launched twice, with kElements of each warp's work: the difference
// of the two runs is what the loop costs without what comes before and after it.
//
// To be adapted where csrc/kernels.h, csrc/cuda/kernels.h or what the launchers call of the runtime change.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "kernels.h"
#include "math/likelihood.h"

// ---- The CUDA runtime, imitated.

namespace {

struct Grid {
  unsigned x, y, z;
};
struct Launch {
  std::string function;  // mangled
  unsigned threads;
  size_t shared;
  std::vector<unsigned char> arguments;
};
std::vector<Launch> launches;
size_t argument_bytes;  // of the kernel that is about to be launched

std::map<const void*, std::string>& functions() {
  static std::map<const void*, std::string> known;
  return known;
}
Grid next_grid, next_block;
size_t next_shared;

}  // namespace

extern "C" {
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*,
                            void*, int*) {
  functions()[host] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
unsigned __cudaPushCallConfiguration(Grid grid, Grid block, size_t shared, void*) {
  next_grid = grid, next_block = block, next_shared = shared;
  return 0;
}
int __cudaPopCallConfiguration(Grid* grid, Grid* block, size_t* shared, void** stream) {
  *grid = next_grid, *block = next_block, *shared = next_shared, *stream = nullptr;
  return 0;
}
int __cudaGetKernel(const void** kernel, const void* host) {
  *kernel = host;
  return 0;
}
int __cudaLaunchKernel(const void* kernel, Grid, Grid block, void** arguments, size_t shared, void*) {
  const auto* bytes = static_cast<const unsigned char*>(arguments[0]);
  launches.push_back(
      {functions()[kernel], block.x * block.y * block.z, shared, {bytes, bytes + argument_bytes}});
  return 0;
}
int cudaLaunchKernel(const void* kernel, Grid grid, Grid block, void** arguments, size_t shared,
                     void* stream) {
  return __cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
int cudaGetDevice(int* device) { return *device = 0; }
int cudaGetLastError() { return 0; }
int cudaPeekAtLastError() { return 0; }
int cudaFuncSetAttribute(const void*, int, int) { return 0; }
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  constexpr int kMultiprocessors = 16;
  *value = attribute == kMultiprocessors ? 132 : 0;
  return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 2;  // the grid is replaced by kGrid anyway
  return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 2;
  return 0;
}
}

// ---- The cases.

using namespace fgbg;

namespace {

constexpr int64_t kElements[] = {512, 1024};  // of a warp: pixels of an image, elements of a row
constexpr int64_t kGrid = 1000000;            // so many blocks that a warp has one segment
constexpr int64_t kWarpsPerBlock = 8;         // of normal_kernel, whose grid and size decide a warp's work

// The operands of one case: each at an address of its own, dense. Counts the bytes that a perfect kernel
// moves for each pixel (for latents: each element).
struct Operands {
  Shape shape;
  DType dtype;
  int64_t run;       // as the ops set it for dense operands
  int64_t channels;  // elements of one operand for each pixel
  int64_t read = 0, written = 0, made = 0;

  void* address() { return reinterpret_cast<void*>(0x7f0000000000 + (++made << 36)); }
  int64_t size() const { return dtype == DType::f32 ? 4 : 2; }
  View dense(int64_t c) {
    View v;
    v.data = address();
    v.dtype = dtype;
    v.stride[4] = 1;
    v.stride[3] = shape.size[4];
    v.stride[2] = shape.size[3] * shape.size[4];
    v.stride[1] = c == 1 && shape.size[1] > 1 ? 0 : shape.plane;
    v.stride[0] = c * shape.plane;
    v.plane_stride = 1;
    v.run = run;
    v.vector_aligned = true;
    return v;
  }
  View input(int64_t c) {
    read += c * size();
    return dense(c);
  }
  View output(int64_t c) {
    written += c * size();
    return dense(c);
  }
  View input() { return input(channels); }
  View output() { return output(channels); }
};

Operands image(DType dtype) {
  const int64_t batch = 64, channels = 3, side = 256, plane = side * side;
  return {{{batch, channels, 1, side, side}, plane, channels * plane, batch * channels * plane, batch, 1},
          dtype,
          channels * plane,
          channels};
}
Operands row(DType dtype) {
  const int64_t batch = 4096, row = 1024;
  return {{{batch, row, 1, 1, 1}, 1, row, batch * row, batch, 1}, dtype, row, 1};
}

template <class Args>
void show(const std::string& name, const Operands& operands, Args args,
          void (*launcher)(const Args&, bool, cuda::Stream)) {
  launches.clear();
  argument_bytes = sizeof(Args);
  for (const int64_t elements : kElements) {
    if constexpr (requires { args.segment; }) {
      launcher(args, false, nullptr);
      // The launcher has chosen a segment's length; here it is what says how long a warp's loop is.
      if (launches.empty()) continue;
      auto* noted = reinterpret_cast<Args*>(launches.back().arguments.data());
      noted->segment = elements * (noted->team / 32);
    } else {
      args.numel = elements * kWarpsPerBlock * kGrid;
      launcher(args, false, nullptr);
    }
  }
  if (launches.size() != 2 || launches[0].function != launches[1].function) {
    std::fprintf(stderr, "%s: expected one kernel a call, got %zu launches in two calls\n", name.c_str(),
                 launches.size());
    std::exit(1);
  }
  std::printf(
      R"({"name": "%s", "dtype": "%s", "function": "%s", "threads": %u, "shared": %zu, "grid": %lld, )",
      name.c_str(), operands.dtype == DType::f32 ? "float32" : "bfloat16", launches[0].function.c_str(),
      launches[0].threads, launches[0].shared, static_cast<long long>(kGrid));
  std::printf(R"("minimum_read": %lld, "minimum_written": %lld, "elements": [%lld, %lld], "arguments": [)",
              static_cast<long long>(operands.read), static_cast<long long>(operands.written),
              static_cast<long long>(kElements[0]), static_cast<long long>(kElements[1]));
  for (size_t i = 0; i < 2; ++i) {
    std::printf(i ? ", \"" : "\"");
    for (const unsigned char byte : launches[i].arguments) std::printf("%02x", byte);
    std::printf("\"");
  }
  std::printf("]}\n");
}

void reconstruction(DType dtype, const char* composition_name, Composition composition,
                    const char* likelihood_name, int likelihood) {
  const std::string label = std::string(composition_name) + " " + likelihood_name;
  for (const bool backward : {false, true}) {
    Operands o = image(dtype);
    ReconstructionArgs a{};
    a.shape = o.shape;
    a.composition = composition;
    a.likelihood = static_cast<Likelihood>(likelihood);
    a.mask_kind = MaskKind::logits;
    a.mask_per_channel = false;
    a.fg = o.input();
    a.bg = o.input();
    a.target = o.input();
    a.mask = o.input(1);
    a.fg_scale.value = a.bg_scale.value = 0.5;
    a.partial = static_cast<double*>(o.address());
    a.final_reductions[0].terms = composition == Composition::masked ? 2 : 1;
    a.final_reductions[0].loss = o.address();
    if (!backward) {
      show(label + " forward", o, a, cuda::reconstruction_forward);
    } else {
      a.grad_fg = o.output();
      a.grad_bg = o.output();
      a.grad_mask = o.output(1);
      a.grad_loss.factor = 1.0 / static_cast<double>(o.shape.size[0]);
      show(label + " backward with sums", o, a, cuda::reconstruction_backward);
    }
  }
}

// What the kernels with maps take: a weight and scales for each element.
void maps(DType dtype, const char* composition_name, Composition composition) {
  for (const bool backward : {false, true}) {
    Operands o = image(dtype);
    ReconstructionArgs a{};
    a.shape = o.shape;
    a.composition = composition;
    a.likelihood = static_cast<Likelihood>(0);
    a.mask_kind = MaskKind::logits;
    a.fg = o.input();
    a.bg = o.input();
    a.target = o.input();
    a.mask = o.input(1);
    a.weight = o.input();
    a.fg_scale_map = o.input();
    a.bg_scale_map = o.input();
    a.partial = static_cast<double*>(o.address());
    a.final_reductions[0].terms = composition == Composition::masked ? 2 : 1;
    a.final_reductions[0].loss = o.address();
    const std::string label = std::string(composition_name) + " Gaussian, maps";
    if (!backward) {
      show(label + " forward", o, a, cuda::reconstruction_forward);
    } else {
      a.grad_fg = o.output();
      a.grad_bg = o.output();
      a.grad_mask = o.output(1);
      a.grad_loss.factor = 1.0 / static_cast<double>(o.shape.size[0]);
      show(label + " backward with sums", o, a, cuda::reconstruction_backward);
    }
  }
}

// K slots with a mask each of logits.
void slots(DType dtype, const char* composition_name, Composition composition, const char* likelihood_name,
           int likelihood, int64_t count) {
  const std::string label = std::to_string(count) + " slots, " + composition_name + " " + likelihood_name;
  for (const bool backward : {false, true}) {
    Operands o = image(dtype);
    const auto of_slots = [&](int64_t channels, bool output) {
      SlotView v{output ? o.output(channels * count) : o.input(channels * count), channels * o.shape.plane};
      v.first.stride[1] = channels == 1 ? 0 : o.shape.plane;
      return v;
    };
    SlotArgs a{};
    a.shape = o.shape;
    a.slots = count;
    a.composition = composition;
    a.likelihood = static_cast<Likelihood>(likelihood);
    a.mask_kind = MaskKind::logits;
    a.x = of_slots(o.channels, false);
    a.mask = of_slots(1, false);
    a.target = o.input();
    a.scale.value = 0.5;
    a.partial = static_cast<double*>(o.address());
    a.final_reductions[0].terms = 1;
    a.final_reductions[0].loss = o.address();
    if (!backward) {
      show(label + " forward", o, a, cuda::slots_forward);
    } else {
      a.grad_x = of_slots(o.channels, true);
      a.grad_mask = of_slots(1, true);
      a.grad_loss.factor = 1.0 / static_cast<double>(o.shape.size[0]);
      show(label + " backward with sums", o, a, cuda::slots_backward);
    }
  }
}

void gaussian(DType dtype, const char* name, Parameterization parameterization, bool z, bool kl,
              bool backward, bool sums) {
  Operands o = row(dtype);
  GaussianArgs a{};
  a.shape = o.shape;
  a.noise.seed = 5;
  if (kl || !backward) a.mu = o.input();
  a.parameterization = parameterization;
  a.standard = true;
  // The noise is all that a standard deviation's gradient by way of z needs.
  const bool reads_spread = kl || !backward || parameterization != Parameterization::std;
  a.spread = reads_spread ? o.input() : o.dense(1);
  if (sums) a.partial = static_cast<double*>(o.address());
  if (!backward) {
    if (z) a.z = o.output();
    return show(name, o, a, cuda::gaussian_forward);
  }
  if (z) a.grad_z = o.input();
  if (kl) {
    a.grad_kl.factor = 1.0 / static_cast<double>(o.shape.size[0]);
    if (!sums) a.grad_kl.grad = o.address();
    a.grad_mu = o.output();  // of z alone it is grad_z itself
  }
  a.grad_spread = o.output();
  show(name, o, a, cuda::gaussian_backward);
}

void bernoulli(DType dtype, const char* name, bool backward) {
  Operands o = row(dtype);
  BernoulliArgs a{};
  a.shape = o.shape;
  a.prior.number.value = -2.0;
  a.logits = o.input();
  a.partial = static_cast<double*>(o.address());
  if (!backward) return show(name, o, a, cuda::bernoulli_forward);
  a.grad_logits = o.output();
  a.grad_kl.factor = 1.0 / static_cast<double>(o.shape.size[0]);
  show(name, o, a, cuda::bernoulli_backward);
}

void log_prob(DType dtype, const char* name, bool backward) {
  Operands o = row(dtype);
  LogProbArgs a{};
  a.shape = o.shape;
  a.z = o.input();
  a.mu.view = o.input();
  a.spread.view = o.input();
  a.partial = static_cast<double*>(o.address());
  if (!backward) return show(name, o, a, cuda::log_prob_forward);
  a.grad_mu = o.output();
  a.grad_spread = o.output();
  a.grad.factor = 1.0 / static_cast<double>(o.shape.size[0]);
  show(name, o, a, cuda::log_prob_backward);
}

void normal(DType dtype) {
  Operands o = row(dtype);
  NormalArgs a{};
  a.noise.seed = 5;
  a.out = o.output();
  show("normal", o, a, cuda::normal);
}

}  // namespace

int main() {
  const char* likelihoods[] = {
#define ENTRY(L, name) #L,
      FGBG_FOR_EACH_LIKELIHOOD(ENTRY)
#undef ENTRY
  };
  for (const DType dtype : {DType::f32, DType::bf16}) {
    int index = 0;
    for (const char* likelihood : likelihoods) {
      reconstruction(dtype, "masked", Composition::masked, likelihood, index);
      reconstruction(dtype, "blended", Composition::blended, likelihood, index);
      reconstruction(dtype, "mixture", Composition::mixture_joint, likelihood, index);
      for (const int64_t count : {3, 7}) {
        slots(dtype, "mixture", Composition::mixture_joint, likelihood, index, count);
        slots(dtype, "blended", Composition::blended, likelihood, index, count);
      }
      ++index;
    }
    maps(dtype, "masked", Composition::masked);
    maps(dtype, "mixture", Composition::mixture_joint);
    for (const auto p : {Parameterization::logvar, Parameterization::std}) {
      const std::string of = p == Parameterization::std ? ", std" : "";
      gaussian(dtype, ("reparameterize forward" + of).c_str(), p, true, false, false, false);
      gaussian(dtype, ("reparameterize backward" + of).c_str(), p, true, false, true, false);
      gaussian(dtype, ("sample_gaussian forward" + of).c_str(), p, true, true, false, true);
      gaussian(dtype, ("sample_gaussian backward" + of).c_str(), p, true, true, true, false);
      gaussian(dtype, ("gaussian_kl forward" + of).c_str(), p, false, true, false, true);
      gaussian(dtype, ("gaussian_kl backward with sums" + of).c_str(), p, false, true, true, true);
    }
    log_prob(dtype, "gaussian_log_prob forward", false);
    log_prob(dtype, "gaussian_log_prob backward with sums", true);
    bernoulli(dtype, "bernoulli_kl forward", false);
    bernoulli(dtype, "bernoulli_kl backward with sums", true);
    normal(dtype);
  }
}
