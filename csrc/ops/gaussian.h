// reparameterize, gaussian_kl and sample_gaussian: z, the KL, or both, by one implementation.
#pragma once

#include "op.h"

namespace fgbg::ops {

struct Gaussian : OpDefaults {
  Tensor mu, spread;  // [*batch, *D], at most kDims dimensions
  // What no argument stands for is the spread of N(0, 1), which as a standard deviation is 1.
  Number prior_mu = {0.0}, prior_spread = {0.0};
  Parameterization parameterization = Parameterization::logvar;
  Tensor seed;
  c10::SymInt offset = 0;
  std::optional<c10::SymInt> num_samples;
  Reduction reduction = Reduction::batchmean;
  int64_t batch_dims = 1;

  const Tensor& like() const { return mu; }
  at::ScalarType dtype() const { return compute_dtype(mu, spread, prior_mu.tensor, prior_spread.tensor); }
  // kKeepSlope for one draw on the CPU, where noise costs more to make again than to keep, and exactly, in
  // the spread's own type.
  Needs keep_slope(Needs needs) const;

  void check_latents() const;
  void check_draw() const;

  // Which results: z if `draws`, the KL if `sums`.
  Forward results(bool draws, bool sums, Needs needs) const;
  Forward run(bool draws, bool sums, Needs needs) const;
  // The gradients that are needed, one for each of the four operands.
  variable_list gradients(const Tensor& grad_z, const Tensor& grad_kl, const Tensor& dz_dspread, Needs needs,
                          bool overwrite) const;
};

struct Reparameterize : Gaussian {
  static constexpr const char* kName = "reparameterize";
  static constexpr size_t kOperands = 2, kOutputs = 1;
  static constexpr std::array kGradNames = {"grad_z"};
  static constexpr const char* kKept = "dz_dspread";

  template <class V>
  void fields(V&& v) {
    v.operand("mu", mu);
    v.operand("logvar", spread);
    v.option("parameterization", parameterization);
    v.constant("seed", seed);
    v.option("offset", offset);
    v.option("num_samples", num_samples);
  }
  void check() const {
    check_latents();
    check_draw();
  }
  Needs also_needs(Needs needs) const { return keep_slope(needs); }
  Tensor kept(const variable_list& saved) const { return saved.empty() ? Tensor() : saved[0]; }

  Forward forward(Needs needs) const { return run(true, false, needs); }
  Forward allocate(Needs needs) const { return results(true, false, needs); }
  Needs reuse(const variable_list& grads, const variable_list& saved, Needs needs, bool overwrite,
              variable_list& out) const;
  variable_list backward(const variable_list& grads, const Tensor& kept, Needs needs, bool overwrite) const {
    variable_list out = gradients(grads[0], {}, kept, needs, overwrite);
    out.resize(kOperands);
    return out;
  }
};

struct GaussianKl : Gaussian {
  static constexpr const char* kName = "gaussian_kl";
  static constexpr size_t kOperands = 4, kOutputs = 1;
  static constexpr std::array kGradNames = {"grad_kl"};

  template <class V>
  void fields(V&& v) {
    v.operand("mu", mu);
    v.operand("logvar", spread);
    v.scale("prior_mu", prior_mu);
    v.scale("prior_logvar", prior_spread);
    v.option("parameterization", parameterization);
    v.option("reduction", reduction);
    v.option("batch_dims", batch_dims);
  }
  void check() const { check_latents(); }

  Forward forward(Needs needs) const { return run(false, true, needs); }
  Forward allocate(Needs needs) const { return results(false, true, needs); }
  Needs reuse(const variable_list& grads, const variable_list& saved, Needs needs, bool overwrite,
              variable_list& out) const {
    return scale_unit_gradients(grads, saved, needs, overwrite, out);
  }
  variable_list backward(const variable_list& grads, const Tensor&, Needs needs, bool overwrite) const {
    return gradients({}, grads[0], {}, needs, overwrite);
  }
};

struct SampleGaussian : Gaussian {
  static constexpr const char* kName = "sample_gaussian";
  static constexpr size_t kOperands = 4, kOutputs = 2;
  static constexpr std::array kGradNames = {"grad_z", "grad_kl"};
  static constexpr const char* kKept = "dz_dspread";

  template <class V>
  void fields(V&& v) {
    v.operand("mu", mu);
    v.operand("logvar", spread);
    v.scale("prior_mu", prior_mu);
    v.scale("prior_logvar", prior_spread);
    v.option("parameterization", parameterization);
    v.constant("seed", seed);
    v.option("offset", offset);
    v.option("num_samples", num_samples);
    v.option("reduction", reduction);
    v.option("batch_dims", batch_dims);
  }
  void check() const {
    check_latents();
    check_draw();
  }
  size_t wanted() const { return 2; }
  Needs also_needs(Needs needs) const { return keep_slope(needs); }
  Tensor kept(const variable_list& saved) const { return saved.empty() ? Tensor() : saved[0]; }

  Forward forward(Needs needs) const { return run(true, true, needs); }
  Forward allocate(Needs needs) const { return results(true, true, needs); }
  Needs reuse(const variable_list&, const variable_list&, Needs needs, bool, variable_list&) const {
    return needs;
  }
  variable_list backward(const variable_list& grads, const Tensor& kept, Needs needs, bool overwrite) const {
    return gradients(grads[0], grads[1], kept, needs, overwrite);
  }
};

}  // namespace fgbg::ops
