// The pixels of an image that a thread handles at a time.
#pragma once

#include "storage.cuh"

namespace fgbg::cuda {
namespace {

// V pixels of sample b from pixel p on. A thread that is not live has come to the end of its segment before
// its warp has: it computes on other pixels, whose results are neither stored nor summed.
template <class F>
struct Pixels {
  const Shape& shape;
  int64_t b, p;
  bool live;

  __device__ int64_t offset(const View& v) const {  // in channel 0
    const int64_t base = b * v.stride[0];
    if (F::V > 1) return base + p;
    if (v.plane_stride >= 0) return base + p * v.plane_stride;
    const int64_t x = p % shape.size[4], rest = p / shape.size[4];
    return base + x * v.stride[4] + (rest % shape.size[3]) * v.stride[3] +
           (rest / shape.size[3]) * v.stride[2];
  }
};

// Channel c of an operand at these pixels.
template <class F>
__device__ __forceinline__ int64_t offset_of(const View& v, const Pixels<F>& px, int c) {
  return px.offset(v) + c * v.stride[1];
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

}  // namespace
}  // namespace fgbg::cuda
