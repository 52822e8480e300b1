// The pixels of an image that a thread handles at a time.
#pragma once

#include "storage.cuh"

namespace fgbg::cuda {
namespace {

// V pixels of sample b from pixel p on. A thread that is not live has come to the end of its segment before
// its warp has: it computes on other pixels, whose results are neither stored nor summed.
template <class F>
struct Pixels {
  int64_t b, p;
  bool live;
  int64_t x, y, z;  // where a single pixel is in its plane

  __device__ Pixels(const Shape& shape, int64_t b, int64_t p, bool live) : b(b), p(p), live(live) {
    if constexpr (F::V == 1) {
      x = p % shape.size[4];
      const int64_t rest = p / shape.size[4];
      y = rest % shape.size[3];
      z = rest / shape.size[3];
    }
  }
  __device__ int64_t offset(const View& v) const {  // in channel 0
    // Products of 32 bits and 64 take half the instructions. (See fits_pixels.)
    if constexpr (F::V > 1) return static_cast<uint32_t>(b) * v.stride[0] + p;
    return b * v.stride[0] + x * v.stride[4] + y * v.stride[3] + z * v.stride[2];
  }
};

// Whether there are not too many samples for formats of several elements.
inline bool fits_pixels(const Shape& shape) { return shape.size[0] >> 32 == 0; }

// Channel c of an operand at these pixels.
template <class F>
__device__ __forceinline__ int64_t offset_of(const View& v, const Pixels<F>& px, int c) {
  return px.offset(v) + static_cast<uint32_t>(c) * v.stride[1];
}
template <class F, class T>
__device__ __forceinline__ void load_channel(const View& v, const Pixels<F>& px, int c, T (&out)[F::V]) {
  Raw<F> raw;
  fetch<F>(v, offset_of(v, px, c), raw);
  unpack<F>(v, raw, out);
}
template <class F, class T>
__device__ __forceinline__ void store_channel(const View& v, const Pixels<F>& px, int c,
                                              const T (&in)[F::V]) {
  if (v && px.live) store<F>(v, offset_of(v, px, c), in);
}

// An operand at a thread's pixels, one channel (or slot) after the other: where it is in memory or, where
// only the run time knows the size of an element, how many of them from the first on.
template <class F, bool kKnown = !F::kMixed>
class Place {
 public:
  __device__ Place() {}
  __device__ Place(const View& v, const Pixels<F>& px, int c) { start(v, px, c); }
  __device__ void start(const View& v, const Pixels<F>& px, int c) {
    const int64_t offset = offset_of(v, px, c);
    if constexpr (kKnown)
      at_ = static_cast<typename F::S*>(v.data) + offset;
    else
      at_ = offset;
  }
  __device__ void step(int64_t elements) { at_ += elements; }
  __device__ void next_channel(const View& v) { step(v.stride[1]); }
  __device__ void fetch(const View& v, Raw<F>& to) const {
    if constexpr (kKnown)
      fetch_as<F::V, typename F::S>(at_, 0, to);
    else
      cuda::fetch<F>(v, at_, to);
  }
  __device__ void fetch_mask(const View& v, Raw<F>& to) const {
    if constexpr (kKnown)
      fetch(v, to);
    else
      cuda::fetch_mask<F>(v, at_, to);
  }
  template <class T, int V>
  __device__ void store(const View& v, const T (&in)[V]) const {
    if constexpr (kKnown)
      store_as<typename F::S>(at_, 0, in);
    else
      cuda::store<F>(v, at_, in);
  }

 private:
  std::conditional_t<kKnown, typename F::S*, int64_t> at_;
};

}  // namespace
}  // namespace fgbg::cuda
