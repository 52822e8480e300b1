// The eager functions and the ops over the emulated kernels, in the place of the CPU's, and torch's memory
// between guard pages.
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>

#include "emulation.h"

// One translation unit: the headers of torch take most of the time.
#include "cpu/caching_allocator.cpp"
#include "eager.cpp"
#include "ops/autograd.cpp"
#include "ops/bernoulli.cpp"
#include "ops/broadcast.cpp"
#include "ops/categorical.cpp"
#include "ops/gaussian.cpp"
#include "ops/log_prob.cpp"
#include "ops/philox.cpp"
#include "ops/reconstruction.cpp"
#include "ops/registration.cpp"
#include "ops/slots.cpp"
#include "ops/tensors.cpp"
#include "ops/words.cpp"

PYBIND11_MODULE(_C, m) { fgbg::bind_eager(m); }

// Never reached: all tensors take the CUDA path.
namespace fgbg::cpu {
const Kernels& kernels() { TORCH_CHECK(false, "a CPU kernel"); }
int64_t row_segments(const Shape&) { TORCH_CHECK(false, "a CPU kernel"); }
int64_t pixel_segments(const Shape&) { TORCH_CHECK(false, "a CPU kernel"); }
void final_reduction(const FinalReduction&) { TORCH_CHECK(false, "a CPU kernel"); }
}  // namespace fgbg::cpu

c10::cuda::CaptureStatus c10::cuda::capture_status;

void cudaMalloc(void** to, size_t bytes) { *to = emulation::guarded_allocate(bytes, true); }

void cudaMemsetAsync(void* to, int value, size_t bytes, CUstream_st*) {
  memset(to, value, bytes);
  ++emulation::counts.memsets;
}

namespace emulation {
namespace {

std::atomic<int> spoilt{0};

struct Block {
  char *base, *data;
  size_t length, bytes;  // of the accessible pages, of the data
};

Block allocate(size_t bytes, bool at_end) {
  const size_t page = sysconf(_SC_PAGESIZE), length = (bytes + page - 1) / page * page;
  char* base = static_cast<char*>(
      mmap(nullptr, length + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  TORCH_CHECK(base != MAP_FAILED, "no memory for ", bytes, " bytes");
  base += page;
  mprotect(base, length, PROT_READ | PROT_WRITE);
  memset(base, kPoison, length);
  return {base, at_end ? base + length - bytes : base, length, bytes};
}

// Frees a block; notes if the rest of its pages, on the side without a guard, was written to.
void release(void* context) {
  const Block* block = static_cast<Block*>(context);
  for (char* p = block->base; p < block->base + block->length; ++p) {
    if (p == block->data) p += block->bytes;
    if (p < block->base + block->length && *p != static_cast<char>(kPoison)) {
      ++spoilt;
      break;
    }
  }
  const size_t page = sysconf(_SC_PAGESIZE);
  munmap(block->base - page, block->length + 2 * page);
  delete block;
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release_nothing, c10::DeviceType::CPU};
    ++counts.allocations;
    auto* block = new Block(emulation::allocate(bytes, random_numbers() % 2 != 0));
    return {block->data, block, &release, c10::DeviceType::CPU};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
  static void release_nothing(void*) {}
};

std::vector<Implement>& implementations() {
  static std::vector<Implement> all;
  return all;
}

struct Quiet : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

c10::Allocator* usual_allocator;
std::unique_ptr<torch::Library> library;

}  // namespace

char* guarded_allocate(size_t bytes, bool at_end) { return allocate(bytes, at_end).data; }

bool add_implementation(c10::DispatchKey key, Implement implement) {
  if (key == c10::DispatchKey::CPU) implementations().push_back(implement);
  return true;
}

}  // namespace emulation

extern "C" {

void emulation_start(uint64_t seed, bool capturing) {
  using namespace emulation;
  c10::cuda::CUDAStream::stream_id += 2;
  c10::cuda::capture_status = capturing ? c10::cuda::CaptureStatus::Active : c10::cuda::CaptureStatus::None;
  static Allocator allocator;
  random_numbers.seed(seed);
  kernels_run.clear();
  counts = {};
  Quiet quiet;  // torch warns that the ops have kernels already
  const c10::WarningUtils::WarningHandlerGuard guard(&quiet);
  library = std::make_unique<torch::Library>(torch::Library::IMPL, "fgbg", c10::DispatchKey::CPU, __FILE__,
                                             __LINE__);
  for (Implement implement : implementations()) implement(*library);
  usual_allocator = c10::GetAllocator(c10::DeviceType::CPU);
  c10::SetAllocator(c10::DeviceType::CPU, &allocator);
}

void emulation_stop() {
  c10::SetAllocator(c10::DeviceType::CPU, emulation::usual_allocator);
  emulation::library.reset();
}

void emulation_counts(emulation::Counts* to) { *to = emulation::counts; }

// How many freed tensors had been written to outside their bounds, since the last call.
int emulation_spoilt() { return emulation::spoilt.exchange(0); }

// The addresses of the kernels that ran since emulation_start; returns how many there are.
size_t emulation_kernels(const void** addresses, size_t room) {
  size_t n = 0;
  for (const void* kernel : emulation::kernels_run)
    if (n < room) addresses[n++] = kernel;
  return emulation::kernels_run.size();
}
}
