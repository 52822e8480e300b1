#include "caching_allocator.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <c10/core/CPUAllocator.h>

#if defined(__linux__) && !defined(FGBG_NO_CPU_CACHE)
#define FGBG_CPU_CACHE
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#endif

namespace fgbg::cpu {

#ifdef FGBG_CPU_CACHE
namespace {

constexpr size_t kPage = 4 << 10, kHugePage = 2 << 20;
// Smaller ones the C library keeps itself.
constexpr size_t kSmallest = 128 << 10;
constexpr size_t kLarge = kHugePage / 2;
constexpr size_t kLimit = 128 << 20;

struct Block {
  void* data;
  size_t bytes;
};

class CachingAllocator final : public c10::Allocator {
 public:
  CachingAllocator() {
    // A child process gets a copy of the mutex: nobody may hold it while it is copied.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
  }

  // Never destroyed: tensors may be freed after static objects are.
  static CachingAllocator& instance() {
    static auto* const allocator = new CachingAllocator;
    return *allocator;
  }

  bool serves(size_t bytes) const { return bytes >= kSmallest && enabled_.load(std::memory_order_relaxed); }

  c10::DataPtr allocate(size_t bytes) override {
    const size_t page = bytes >= kLarge ? kHugePage : kPage;
    const size_t whole = (bytes + page - 1) / page * page;
    void* data = take(whole);
    if (!data) {
      if (posix_memalign(&data, page, whole) != 0) {
        c10::profiledCPUMemoryReporter().OutOfMemory(bytes);
        TORCH_CHECK_WITH(OutOfMemoryError, false, "fgbg_cuda: cannot allocate ", bytes,
                         " bytes for a result");
      }
      if (page == kHugePage) madvise(data, whole, MADV_HUGEPAGE);
    }
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, new Block{data, whole}, &release, c10::DeviceType::CPU};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }

  void use(bool enabled) { enabled_ = enabled; }
  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    shrink_to(0);
  }
  size_t total() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return total_;
  }

 private:
  static void release(void* context) {
    const std::unique_ptr<Block> block(static_cast<Block*>(context));
    c10::profiledCPUMemoryReporter().Delete(block->data);
    instance().keep(*block);
  }

  void* take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = std::find_if(blocks_.rbegin(), blocks_.rend(),
                                    [&](const Block& block) { return block.bytes == bytes; });
    if (found == blocks_.rend()) return nullptr;
    void* data = found->data;
    blocks_.erase(std::next(found).base());
    total_ -= bytes;
    return data;
  }

  void keep(Block block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks_.push_back(block);
    total_ += block.bytes;
    shrink_to(kLimit);
  }

  // Frees the oldest first.
  void shrink_to(size_t bytes) {
    while (total_ > bytes) {
      total_ -= blocks_.front().bytes;
      free(blocks_.front().data);
      blocks_.pop_front();
    }
  }

  std::mutex mutex_;
  std::deque<Block> blocks_;  // freed ones, the oldest first
  size_t total_ = 0;          // their bytes
  std::atomic<bool> enabled_{true};
};

}  // namespace

void use_cache(bool enabled) { CachingAllocator::instance().use(enabled); }
int64_t cached_bytes() { return static_cast<int64_t>(CachingAllocator::instance().total()); }
void empty_cache() { CachingAllocator::instance().clear(); }

#else

void use_cache(bool) {}
int64_t cached_bytes() { return 0; }
void empty_cache() {}

#endif

namespace {

constexpr c10::DispatchKeySet kDense(c10::DispatchKey::CPU);

c10::Allocator* allocator_of([[maybe_unused]] int64_t numel, [[maybe_unused]] at::ScalarType dtype) {
#ifdef FGBG_CPU_CACHE
  auto& cache = CachingAllocator::instance();
  if (cache.serves(static_cast<size_t>(numel) * c10::elementSize(dtype))) return &cache;
#endif
  return c10::GetCPUAllocator();
}

}  // namespace

at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  c10::Allocator* const allocator = allocator_of(c10::multiply_integers(sizes), dtype);
  return at::detail::empty_generic(sizes, allocator, kDense, dtype, std::nullopt);
}

at::Tensor empty_like(const at::Tensor& like, at::ScalarType dtype) {
  const auto strides = like.is_non_overlapping_and_dense()
                           ? like.strides().vec()
                           : at::infer_dense_strides(like.sizes(), like.strides());
  return at::detail::empty_strided_generic(like.sizes(), strides, allocator_of(like.numel(), dtype), kDense,
                                           dtype);
}

}  // namespace fgbg::cpu
