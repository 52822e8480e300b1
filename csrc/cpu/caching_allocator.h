// The results of CPU ops, allocated past the dispatcher, which costs more than a small result does; large
// ones by a caching allocator.
//
// A freed tensor of more than some 100 KB may go back to the system, and the next one then comes as pages
// that have never been touched: a page fault for each, several times as slow as writing to it. So freed
// blocks are kept for the next result of the same size, as each training step has. Blocks of a megabyte and
// more begin on a boundary of 2 MB and ask for huge pages (a wish: where it is not granted no result
// changes).
//
// Off where sanitizers look for overruns (FGBG_NO_CPU_CACHE), which rounded and recycled blocks would hide.
#pragma once

#include <ATen/core/Tensor.h>

namespace fgbg::cpu {

at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype);
// Dense, in the order of the strides of `like`.
at::Tensor empty_like(const at::Tensor& like, at::ScalarType dtype);

// Whether large results come from the cache (at first they do). What it holds stays until it is emptied.
void use_cache(bool enabled);
// Bytes of freed blocks that are kept, at most 128 MB.
int64_t cached_bytes();
void empty_cache();

}  // namespace fgbg::cpu
