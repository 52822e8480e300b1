// Sums of the gradients of operands that are broadcast, on the CPU.
#include "kernel_table.h"
#include "sums.h"
#include "views.h"

namespace fgbg::cpu {
inline namespace FGBG_ISA {
namespace {

// The same for both types of the computation: a task is as long for both.
constexpr int64_t kSumBlock = kBlock<double>;

// The elements of a shape as they are summed. The last dimensions, as many as are all kept or all summed,
// make a run; before it stand dimensions of both kinds.
class Runs {
 public:
  explicit Runs(const BroadcastArgs& args) : shape_(args.shape) {
    for (int d = 0; d < kDims; ++d) summed_[d] = args.to.stride[d] == 0;
    int last = kDims - 1;
    while (last > 0 && shape_.size[last] == 1) --last;
    sums_ = summed_[last];
    for (; last >= 0 && (shape_.size[last] == 1 || summed_[last] == sums_); --last)
      length_ *= shape_.size[last];
    outer_ = last + 1;
    for (int d = 0; d < outer_; ++d) (summed_[d] ? terms_ : results_) *= shape_.size[d];
  }
  bool sums() const { return sums_; }           // whether a run is summed
  int64_t length() const { return length_; }    // of a run
  int64_t results() const { return results_; }  // how often a run stands in the result
  int64_t terms() const { return terms_; }      // and how many are summed for each

  // Where the run of a result and a term begins.
  int64_t begin(int64_t result, int64_t term) const {
    int64_t index = 0, step = length_;
    for (int d = outer_ - 1; d >= 0; --d) {
      int64_t& rest = summed_[d] ? term : result;
      index += rest % shape_.size[d] * step;
      rest /= shape_.size[d];
      step *= shape_.size[d];
    }
    return index;
  }

 private:
  const Shape& shape_;
  bool summed_[kDims], sums_;
  int outer_;
  int64_t length_ = 1, results_ = 1, terms_ = 1;
};

template <class T>
void write_result(const BroadcastArgs& args, double x, int64_t index) {
  write(static_cast<T>(x), args.to.data, args.to.dtype, offset_of(args.to, args.shape, index));
}

// A task is one result that sums runs, or a block of those that runs are added up in.
template <class T>
void broadcast_sum(const BroadcastArgs& args, int64_t first, int64_t last) {
  const Runs runs(args);
  constexpr int64_t block = kSumBlock;
  const int64_t length = runs.length(), blocks = segments_of(length, block);
  Input<T> in;
  for (int64_t task = first; task < last; ++task) {
    if (runs.sums()) {
      double total = 0.0;
      for (int64_t term = 0; term < runs.terms(); ++term) {
        const int64_t begin = runs.begin(task, term);
        for (int64_t i = 0; i < length; i += block) {
          const int64_t n = min(block, length - i);
          total += sum(in.load(args.from, {args.shape, begin + i, n}), n);
        }
      }
      write_result<T>(args, total, runs.begin(task, 0));
      continue;
    }
    const int64_t result = task / blocks, at = task % blocks * block, n = min(block, length - at);
    double totals[kSumBlock] = {};
    for (int64_t term = 0; term < runs.terms(); ++term) {
      const T* x = in.load(args.from, {args.shape, runs.begin(result, term) + at, n});
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) totals[k] += static_cast<double>(x[k]);
    }
    const int64_t begin = runs.begin(result, 0) + at;
    for (int64_t k = 0; k < n; ++k) write_result<T>(args, totals[k], begin + k);
  }
}

int64_t broadcast_tasks(const BroadcastArgs& args) {
  const Runs runs(args);
  return runs.results() * (runs.sums() ? 1 : segments_of(runs.length(), kSumBlock));
}
int64_t broadcast_cost(const BroadcastArgs& args) { return args.shape.numel / broadcast_tasks(args); }

}  // namespace

void add_broadcast(Kernels& table) {
  table.broadcast_sum = {broadcast_tasks, broadcast_cost, {broadcast_sum<float>, broadcast_sum<double>}};
}

}  // namespace FGBG_ISA
}  // namespace fgbg::cpu
