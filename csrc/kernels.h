// What the kernels of both devices are called with: raw pointers and sizes, no torch.
//
// Words used throughout the kernels:
//   row      the elements of one sample; plane: its spatial elements, of one channel
//   segment  a fixed piece of a row (or of the pixels of a sample) that one task or team sums
//   task     what one call of a CPU kernel does: a segment, or several short rows
//   team     the CUDA threads that take a segment: a warp or a block
//   block    on the CPU, as many elements as the stages of a kernel pass on at a time through the first-level
//            cache; on CUDA, CUDA's word
//   group    the channels that share a mask value; on CUDA the elements that a thread handles at a time
//   span     consecutive elements in logical (row-major) order; run: consecutive in memory too
//   pack     64 bytes of numbers that are summed lane by lane; lane: one of them, or a thread of a warp
#pragma once

#include <cstddef>

#include "math/config.h"

namespace fgbg {

enum class DType : int32_t { f64, f32, bf16, f16, u8 };  // u8: bool and uint8 masks
enum class Reduction : int32_t { none, sample, batchmean, sum, mean };
enum class Composition : int32_t { masked, blended, mixture_joint, mixture_independent, plain };
enum class MaskKind : int32_t { probability, logits, log_probability };
enum class Likelihood : int32_t;  // by position in FGBG_FOR_EACH_LIKELIHOOD
enum class Parameterization : int32_t { logvar, log_std, std };

// Logical sizes [B, C, S0, S1, S2]; missing dimensions are 1.
constexpr int kDims = 5;
struct Shape {
  int64_t size[kDims];
  int64_t plane;  // S0 * S1 * S2
  int64_t row;    // elements of one sample
  int64_t numel;
  int64_t samples;  // the product of the leading sizes
  int leading;      // how many of the sizes these are
};

// One operand, indexed by the logical coordinates of a Shape whatever its memory layout.
struct View {
  void* data = nullptr;  // null: absent
  DType dtype = DType::f32;
  int64_t stride[kDims] = {};   // in elements; 0 along broadcast dimensions
  int64_t plane_stride = -1;    // stride of the spatial index if one number describes it, else -1
  int64_t run = 1;              // aligned runs of this many logical elements are contiguous in memory
  bool vector_aligned = false;  // every such run starts on a 16-byte boundary
  FGBG_FN explicit operator bool() const { return data != nullptr; }
};

// An operand that is one number, or a tensor of one number, or one per channel. See scale_at().
struct ScaleView {
  const void* data = nullptr;  // null: `value`
  DType dtype = DType::f32;
  int64_t stride = 0;
  double value = 1.0;
};

// An operand that is broadcast: a tensor, or one number.
struct BroadcastView {
  View view;
  ScaleView number;  // where view is absent
};

// The upstream gradient of a reduced loss, per element of sample b: grad[b * stride] * factor, where factor
// is 1/B for batchmean and so on.
struct Upstream {
  const void* grad = nullptr;  // compute dtype; null: a gradient of one
  int64_t stride = 0;          // 1 for reduction="sample", 0 for the scalars
  double factor = 0.0;         // 0: there is no upstream gradient
  FGBG_FN explicit operator bool() const { return factor != 0.0; }
};

struct Noise {
  const int64_t* seed_on_device = nullptr;  // null: `seed`
  int64_t seed = 0;
  uint64_t offset = 0;
};

struct NormalArgs {
  Noise noise;
  View out;
  int64_t numel;
};

// Gradients of a reduced loss for an upstream gradient of one, to be multiplied by the one that arrived.
struct ScalingArgs {
  static constexpr int kMax = 7;
  static constexpr int64_t kTask = 16384;  // elements
  struct {
    void* data;
    DType dtype;
    int64_t numel, row;  // row: elements that share an upstream gradient, consecutive in memory
  } gradients[kMax];
  int count = 0;
  int64_t tasks = 0;
  Upstream upstream;
};

// The gradient of an operand that is broadcast, from those of the elements that took it.
struct BroadcastArgs {
  Shape shape;
  View from;  // of this shape
  View to;    // stride 0 along what is summed
};

// Per-sample sums a masked loss is made of: foreground nats, background nats, foreground area and
// background area in pixels. (The background has a sum of its own because the image area less the
// foreground's would cancel.) Blended and mixture losses use the first alone.
constexpr int kTerms = 4;

// The second stage of a reduction: the partial sums of each sample in order, then the samples in order, in
// float64.
struct FinalReduction {
  const double* partial = nullptr;  // [terms, batch, segments]
  int terms;                        // 1, or up to kTerms for reconstruction losses
  int64_t batch, segments;
  Reduction reduction;
  double factor = 1.0;  // of the sum over the batch
  ScaleView fg_weight, bg_weight{nullptr, DType::f32, 0, 0.0};
  bool normalize_area = false;
  double channels = 1.0;
  void* loss = nullptr;       // [batch] or a scalar; null for reduction none
  DType dtype;                // of the loss
  void* out_terms = nullptr;  // [kTerms, batch] compute dtype, or null
  FGBG_FN explicit operator bool() const { return loss || out_terms; }
};

// The final reductions of a kernel's partial sums: run after the kernel on the CPU, by its last block on
// CUDA.
struct Sums {
  FinalReduction
      final_reductions[3];  // of the loss and of the derivatives with respect to fg_scale and bg_scale
  // CUDA alone:
  int64_t segment = 0;              // elements of a sample (pixels, for images) that a team sums
  int team = 0;                     // threads of it: a warp or a block
  uint32_t* blocks_done = nullptr;  // 0 before and after every launch
};

// z = mu + std eps and KL(N(mu, std^2) || prior); either may be absent. `spread`: the logvar, log_std or std.
struct GaussianArgs : Sums {
  Shape shape;          // of mu
  int64_t samples = 1;  // z is [samples, *shape], dense when samples > 1
  Noise noise;
  Parameterization parameterization;
  View mu, spread;
  bool standard = false;  // the prior is N(0, 1)
  BroadcastView prior_mu, prior_spread;
  // forward
  View z;
  View kl;                    // reduction none
  double* partial = nullptr;  // otherwise: [B, segments]
  // CPU, single draw: if present, written by forward and read by backward, which then need not recompute eps.
  View dz_dspread;
  // backward
  View grad_z;
  View grad_kl_elements;  // reduction none
  Upstream grad_kl;
  View grad_mu, grad_spread, grad_prior_mu, grad_prior_spread;
};

// log N(z; mu, std^2).
struct LogProbArgs : Sums {
  Shape shape;  // of z
  Parameterization parameterization;
  View z;
  BroadcastView mu, spread;
  View log_prob;
  double* partial = nullptr;
  View grad_elements;
  Upstream grad;
  View grad_z, grad_mu, grad_spread;
};

struct BernoulliArgs : Sums {
  Shape shape;
  View logits;
  BroadcastView prior;
  View kl;
  double* partial = nullptr;
  View grad_kl_elements;
  Upstream grad_kl;
  View grad_logits, grad_prior;
};

// KL of K outcomes, from logits. An outcome of a View is `..._step` elements after the one before.
struct CategoricalArgs : Sums {
  Shape shape;  // of the logits without the dimension of the outcomes
  int64_t outcomes;
  View logits, prior;  // prior absent: uniform
  int64_t logits_step = 0, prior_step = 0;
  View kl;
  double* partial = nullptr;
  View grad_kl_elements;
  Upstream grad_kl;
  View grad_logits, grad_prior;
  int64_t grad_logits_step = 0, grad_prior_step = 0;
};

struct ReconstructionArgs : Sums {
  Shape shape;  // of fg
  Composition composition;
  Likelihood likelihood;
  MaskKind mask_kind;
  bool mask_per_channel;           // mask is [B, C, *spatial], not [B, 1, *spatial]
  ScaleView fg_weight, bg_weight;  // one number each
  bool normalize_area = false;
  View fg, bg, target, mask;        // bg absent: fg in both regions; plain: fg and target alone
  View weight;                      // of the loss of each element
  ScaleView fg_scale, bg_scale;     // of each channel
  View fg_scale_map, bg_scale_map;  // of each element, in the place of those
  // forward
  View loss;                  // reduction none
  double* partial = nullptr;  // otherwise: [kTerms, B, segments]
  bool areas = false;         // whether the sums of the mask are wanted (the CPU skips them otherwise)
  // backward
  View grad_loss_elements;  // reduction none
  Upstream grad_loss;
  const void* terms = nullptr;       // [kTerms, B] compute dtype, for normalize_area
  const void* grad_terms = nullptr;  // [kTerms, B] compute dtype, or null
  View grad_fg, grad_bg, grad_target, grad_mask, grad_weight, grad_fg_scale_map, grad_bg_scale_map;
  double* scale_partial = nullptr;  // [2, C, B, segments] sums of d(loss)/d(scale), or null
  // CUDA alone:
  bool one_image = false;    // bg is absent, and here the same as fg
  bool scale_slots = false;  // whether there is shared memory for the gradients of the scales
};

// An operand [B, K, C, *spatial] of a loss of slots: the View of the first slot, and how far the next one is.
struct SlotView {
  View first;
  int64_t stride = 0;  // in elements
  FGBG_FN explicit operator bool() const { return first.data != nullptr; }
};

// Losses of an image that K slots make up: a mixture of them (joint or independent), or their blend.
struct SlotArgs : Sums {
  Shape shape;  // of the target, [B, C, *spatial]
  int64_t slots;
  Composition composition;
  Likelihood likelihood;
  MaskKind mask_kind;     // logits or log_probability
  bool mask_per_channel;  // mask is [B, K, C, *spatial], not [B, K, 1, *spatial]
  SlotView x, mask;
  View target, weight;  // weight absent: 1
  // Of a mixture one number, or one for each slot; of a blend one number, or one for each channel.
  ScaleView scale;
  bool one_scale = true;  // one number, as far as gradients go
  SlotView scale_map;     // present: one for each element instead (of a blend in the first slot)
  // forward
  View loss;                  // reduction none
  double* partial = nullptr;  // otherwise: [B, segments]
  SlotView responsibilities;
  // backward
  View grad_loss_elements;  // reduction none
  Upstream grad_loss;
  SlotView grad_x, grad_mask, grad_scale_map;
  View grad_target, grad_weight;
  double* scale_partial = nullptr;  // [1 or K or C, B, segments] sums of d(loss)/d(scale), or null
  // CUDA alone:
  void* scratch = nullptr;  // [K, B, plane] a number for each slot, or null: there is room in shared memory
  int64_t scratch_shared = 0;  // bytes of it that are
  bool scale_slots = false;    // whether there is shared memory for the gradients of the scales
};

// Work is cut into segments of so many elements of a sample (pixels, for images). The cut depends on
// shapes alone, never on threads, so that sums are always formed in the same order.
FGBG_FN int64_t segments_of(int64_t extent, int64_t segment) { return (extent + segment - 1) / segment; }

}  // namespace fgbg
