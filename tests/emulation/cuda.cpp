// Runs the threads of several blocks as fibers, one at a time, in an order that is random but for what the
// barriers of a block and of its warps impose.
#include "cuda.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulation.h"

Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

std::mt19937_64 random_numbers;
std::set<const void*> kernels_run;
Counts counts;

namespace {

constexpr int kWarp = 32, kMaxThreads = 1024, kResident = kMultiprocessors * kBlocksOfEach;
constexpr size_t kStack = 64 << 10, kSharedMemory = 48 << 10;

enum class State { ready, shuffle, barrier, finished };

struct Fiber {
  State state;
  int line;        // of the barrier it waits at
  unsigned delta;  // and what a shuffle exchanges
  uint64_t bits;
  bool started = false;
  jmp_buf position;
  ucontext_t start;
};

struct Block {
  unsigned index;
  std::vector<int> running;  // the first thread of each warp that does not wait for the others
  // Shared memory: arrays from the end, variables from the begin; by the place of their declaration.
  char* const shared_end = guarded_allocate(kSharedMemory, true) + kSharedMemory;
  std::map<int, void*> declared;
  size_t arrays, variables;
  char* dynamic;
  std::vector<Fiber> fibers = std::vector<Fiber>(kMaxThreads);
};

Block blocks_resident[kResident];
Block* block;  // that of the thread that runs, and the thread
Fiber* current;
jmp_buf scheduler;
std::string failure;
const std::function<void()>* body;
size_t dynamic_shared_bytes;

// Contexts are used to give a fiber its stack, once; after that _setjmp and _longjmp, without system calls.
void leave(State state) {
  current->state = state;
  if (_setjmp(current->position) == 0) _longjmp(scheduler, 1);
}

void live() {
  for (;;) {
    (*body)();
    leave(State::finished);
  }
}

void resume(int thread) {
  current = &block->fibers[thread];
  threadIdx = {static_cast<unsigned>(thread), 0, 0};
  if (_setjmp(scheduler) != 0) return;
  if (current->started) _longjmp(current->position, 1);
  static char* const stacks =
      static_cast<char*>(mmap(nullptr, kResident * kMaxThreads * kStack, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  getcontext(&current->start);
  current->start.uc_stack.ss_sp = stacks + ((block - blocks_resident) * kMaxThreads + thread) * kStack;
  current->start.uc_stack.ss_size = kStack;
  makecontext(&current->start, live, 0);
  current->started = true;
  setcontext(&current->start);
}

void fail(const std::string& what) {
  throw std::runtime_error(what + " (block " + std::to_string(blockIdx.x) + " of " +
                           std::to_string(gridDim.x) + ", thread " + std::to_string(threadIdx.x) + ")");
}

// -fsanitize traps on a misaligned access (or an index past an array, or a division by 0); guard pages fault
// on one out of bounds.
void on_fault(int signal, siginfo_t* info, void*) {
  char text[99];
  snprintf(
      text, sizeof text, "%s at address %p",
      signal == SIGSEGV || signal == SIGBUS ? "access out of bounds" : "misaligned access, index or division",
      info->si_addr);
  failure = text;
  _longjmp(scheduler, 1);
}

class FaultHandlers {
 public:
  FaultHandlers() {
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;  // the handler does not return
    for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &action, &before_[i]);
  }
  ~FaultHandlers() {
    for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &before_[i], nullptr);
  }

 private:
  static constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
  struct sigaction before_[4];
};

std::vector<int> shuffled(int begin, int end) {
  std::vector<int> order(end - begin);
  std::iota(order.begin(), order.end(), begin);
  std::shuffle(order.begin(), order.end(), random_numbers);
  return order;
}

// Threads first .. first + count - 1 are where the first is, else they have parted for good.
State common_state(int first, int count) {
  const std::vector<Fiber>& fibers = block->fibers;
  const Fiber& f = fibers[first];
  for (int t = first + 1; t < first + count; ++t)
    if (fibers[t].state != f.state || (f.state != State::finished && fibers[t].line != f.line) ||
        (f.state == State::shuffle && fibers[t].delta != f.delta)) {
      threadIdx.x = t;
      fail("thread " + std::to_string(first) + " and another wait at different barriers, or one has left");
    }
  return f.state;
}

// Runs each lane of a warp to where it waits, then exchanges what a shuffle asks for.
State run_warp(int first) {
  for (int t : shuffled(first, first + kWarp)) {
    resume(t);
    if (!failure.empty()) fail(failure);
  }
  const State state = common_state(first, kWarp);
  std::vector<Fiber>& fibers = block->fibers;
  if (state == State::shuffle) {
    // Upwards: the lane above still has what it brought.
    for (int lane = 0; lane + static_cast<int>(fibers[first].delta) < kWarp; ++lane)
      fibers[first + lane].bits = fibers[first + lane + fibers[first].delta].bits;
  }
  return state;
}

void let_warps_run(int threads) {
  for (int first = 0; first < threads; first += kWarp) block->running.push_back(first);
}

void start_block(unsigned index, int threads) {
  block->index = index;
  memset(block->shared_end - kSharedMemory, kPoison, kSharedMemory);
  block->declared.clear();
  block->arrays = block->variables = 0;
  block->dynamic = block->shared_end - (block->arrays += dynamic_shared_bytes);
  block->running.clear();
  let_warps_run(threads);
}

// Runs one warp, any of those that can, to where it waits. Returns false when all threads have finished.
bool advance_block(int threads, int unwanted) {
  std::vector<int>& running = block->running;
  const size_t k = random_numbers() % running.size();
  if (running[k] == unwanted) return true;
  if (run_warp(running[k]) == State::shuffle) return true;
  running[k] = running.back();
  running.pop_back();
  if (!running.empty()) return true;
  if (common_state(0, threads) == State::finished) return false;
  let_warps_run(threads);
  return true;
}

}  // namespace

void run(const void* kernel, int blocks, int threads, size_t shared, const std::function<void()>& thread) {
  gridDim = {static_cast<unsigned>(blocks), 1, 1};
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  if (blocks < 1 || threads < 1 || threads > kMaxThreads || threads % kWarp != 0) fail("invalid launch");
  kernels_run.insert(kernel);
  ++counts.launches;
  body = &thread;
  dynamic_shared_bytes = shared;
  failure.clear();
  const FaultHandlers handlers;
  std::vector<int> waiting = shuffled(0, blocks);
  std::vector<Block*> resident;
  const auto start = [&](Block* here) {
    block = here;
    start_block(waiting.back(), threads);
    waiting.pop_back();
  };
  for (Block& here : blocks_resident) {
    if (waiting.empty()) break;
    start(&here);
    resident.push_back(&here);
  }
  // Blocks take turns at random, too. One warp only runs where nothing else can: what does not wait for it
  // shows.
  const unsigned late_block = random_numbers() % blocks;
  const int late_warp = random_numbers() % (threads / kWarp) * kWarp;
  const auto others_run = [&] {
    return std::any_of(resident.begin(), resident.end(), [&](const Block* b) {
      return std::any_of(b->running.begin(), b->running.end(),
                         [&](int warp) { return b->index != late_block || warp != late_warp; });
    });
  };
  try {
    while (!resident.empty()) {
      const size_t k = random_numbers() % resident.size();
      block = resident[k];
      blockIdx = {block->index, 0, 0};
      const bool hold_back = block->index == late_block && others_run();
      if (advance_block(threads, hold_back ? late_warp : -1)) continue;
      if (!waiting.empty()) {
        start(block);
      } else {
        resident[k] = resident.back();
        resident.pop_back();
      }
    }
  } catch (...) {
    for (Block& here : blocks_resident)  // abandons the threads
      for (Fiber& f : here.fibers) f.started = false;
    throw;
  }
}

void* dynamic_shared_memory() { return block->dynamic; }

void* shared_memory(size_t bytes, int place, bool at_end) {
  void*& memory = block->declared[place];
  if (memory) return memory;
  if (at_end) return memory = block->shared_end - (block->arrays += bytes);
  memory = block->shared_end - kSharedMemory + block->variables;
  block->variables += 16;  // whatever its type, the next one is aligned
  return memory;
}

uint64_t shuffle_down(unsigned mask, uint64_t bits, unsigned delta, int line) {
  current->line =
      mask == 0xffffffffu ? line : -static_cast<int>(threadIdx.x);  // no other mask is provided for
  current->delta = delta;
  current->bits = bits;
  leave(State::shuffle);
  return current->bits;
}

}  // namespace emulation

void __syncthreads(int line) {
  emulation::current->line = line;
  emulation::leave(emulation::State::barrier);
}
