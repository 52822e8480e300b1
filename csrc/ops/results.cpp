// Memory of results. Tensors above some 100 KB may be given back to the system when they are freed, so that
// the next one comes as pages that have never been touched; the system hands those over one by one as a
// kernel writes to them, which in pages of 4 KB takes several times as long as the writing. Up to kKept bytes
// of such results are therefore kept for the next ones of the same size, as each training step has. Large
// ones besides begin on a boundary of 2 MB and ask for huge pages (a wish: where it is not granted no result
// changes).
#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <c10/core/CPUAllocator.h>

#ifdef __linux__
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <mutex>
#endif

#include "common.h"

namespace fgbg::ops {
namespace {

#ifdef __linux__
constexpr size_t kPage = 4 << 10, kHugePage = 2 << 20;
constexpr size_t kWorthKeeping = 128 << 10, kLarge = kHugePage / 2;

constexpr size_t kKept = 128 << 20;

struct Block {
  void* data;
  size_t bytes;
};

// Freed blocks, the oldest first.
class Kept {
 public:
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
  void add(Block block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks_.push_back(block);
    total_ += block.bytes;
    while (total_ > kKept) {
      total_ -= blocks_.front().bytes;
      free(blocks_.front().data);
      blocks_.pop_front();
    }
  }

 private:
  std::mutex mutex_;
  std::deque<Block> blocks_;
  size_t total_ = 0;
};

Kept& kept() {
  static Kept* const kept = new Kept;  // never destroyed: tensors may be freed after static objects are
  return *kept;
}

struct KeptPages final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const size_t page = bytes >= kLarge ? kHugePage : kPage;
    const size_t whole = (bytes + page - 1) / page * page;
    void* data = kept().take(whole);
    if (!data) {
      if (posix_memalign(&data, page, whole) != 0) {
        c10::profiledCPUMemoryReporter().OutOfMemory(bytes);
        TORCH_CHECK_WITH(OutOfMemoryError, false, "fgbg: cannot allocate ", bytes, " bytes for a result");
      }
      if (page == kHugePage) madvise(data, whole, MADV_HUGEPAGE);
    }
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, new Block{data, whole}, &release, c10::DeviceType::CPU};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }

 private:
  static void release(void* context) {
    const std::unique_ptr<Block> block(static_cast<Block*>(context));
    c10::profiledCPUMemoryReporter().Delete(block->data);
    kept().add(*block);
  }
};

KeptPages kept_pages;

bool worth_keeping(int64_t numel, const at::TensorOptions& options) {
  return options.device().is_cpu() &&
         static_cast<size_t>(numel) * options.dtype().itemsize() >= kWorthKeeping;
}
#endif

}  // namespace

Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options) {
#ifdef __linux__
  if (worth_keeping(c10::multiply_integers(sizes), options))
    return at::detail::empty_generic(sizes, &kept_pages, c10::DispatchKeySet(c10::DispatchKey::CPU),
                                     c10::typeMetaToScalarType(options.dtype()), std::nullopt);
#endif
  return at::empty(sizes, options);
}

Tensor empty_result_like(const Tensor& like, const at::TensorOptions& options) {
#ifdef __linux__
  if (worth_keeping(like.numel(), options)) {
    const auto strides = like.is_non_overlapping_and_dense()
                             ? like.strides().vec()
                             : at::infer_dense_strides(like.sizes(), like.strides());
    return at::detail::empty_strided_generic(like.sizes(), strides, &kept_pages,
                                             c10::DispatchKeySet(c10::DispatchKey::CPU),
                                             c10::typeMetaToScalarType(options.dtype()));
  }
#endif
  return at::empty_like(like, options);
}

}  // namespace fgbg::ops
