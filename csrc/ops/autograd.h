// Typed handles of the dispatcher ops, shared by the autograd formulas and the Python bindings.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>

namespace fgbg::ops {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalSymInt = std::optional<c10::SymInt>;
using std::string_view;

#define FGBG_OP(name, ...)                                                                       \
  inline const auto& name##_op() {                                                               \
    static const auto handle =                                                                   \
        c10::Dispatcher::singleton().findSchemaOrThrow("fgbg::" #name, "").typed<__VA_ARGS__>(); \
    return handle;                                                                               \
  }

FGBG_OP(philox_normal, Tensor(const Tensor&, c10::SymIntArrayRef, c10::SymInt, at::ScalarType))
FGBG_OP(reparameterize, Tensor(const Tensor&, const Tensor&, const Tensor&, c10::SymInt, OptionalSymInt))
FGBG_OP(reparameterize_backward,
        std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, c10::SymInt,
                                   OptionalSymInt, std::array<bool, 2>))
FGBG_OP(reparameterize_with_gradient,
        std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, c10::SymInt))
FGBG_OP(gaussian_kl,
        Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, string_view))
FGBG_OP(gaussian_kl_backward,
        std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                   const OptionalTensor&, const OptionalTensor&, string_view,
                                                   std::array<bool, 4>))
FGBG_OP(gaussian_kl_with_gradients,
        std::tuple<Tensor, std::vector<Tensor>>(const Tensor&, const Tensor&, const OptionalTensor&,
                                                const OptionalTensor&, string_view, std::array<bool, 4>))
FGBG_OP(gaussian_kl_backward_,
        void(at::TensorList, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
             const OptionalTensor&, string_view, std::array<bool, 4>))
FGBG_OP(sample_gaussian,
        std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                   const Tensor&, c10::SymInt, OptionalSymInt, string_view))
FGBG_OP(sample_gaussian_backward,
        std::tuple<Tensor, Tensor, Tensor, Tensor>(const OptionalTensor&, const OptionalTensor&,
                                                   const Tensor&, const Tensor&, const OptionalTensor&,
                                                   const OptionalTensor&, const Tensor&, c10::SymInt,
                                                   OptionalSymInt, string_view, std::array<bool, 4>))
FGBG_OP(sample_gaussian_with_gradient,
        std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&,
                                           const OptionalTensor&, const Tensor&, c10::SymInt, string_view))
FGBG_OP(sample_gaussian_backward_,
        std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                                           const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                           string_view, std::array<bool, 4>))
FGBG_OP(bernoulli_kl, Tensor(const Tensor&, const OptionalTensor&, double, string_view))
FGBG_OP(bernoulli_kl_backward, std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&,
                                                          double, string_view, std::array<bool, 2>))
FGBG_OP(bernoulli_kl_with_gradients,
        std::tuple<Tensor, std::vector<Tensor>>(const Tensor&, const OptionalTensor&, double, string_view,
                                                std::array<bool, 2>))
FGBG_OP(bernoulli_kl_backward_, void(at::TensorList, const Tensor&, const Tensor&, const OptionalTensor&,
                                     double, string_view, std::array<bool, 2>))
FGBG_OP(reconstruction_loss,
        std::tuple<Tensor, Tensor>(const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                                   const OptionalTensor&, const OptionalTensor&, double, double, string_view,
                                   bool, string_view, double, double, bool, string_view, bool))
FGBG_OP(reconstruction_loss_backward,
        std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
            const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
            const OptionalTensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
            double, double, string_view, bool, string_view, double, double, bool, string_view,
            std::array<bool, 6>))
FGBG_OP(reconstruction_loss_with_gradients,
        std::tuple<Tensor, Tensor, std::vector<Tensor>>(const Tensor&, const OptionalTensor&, const Tensor&,
                                                        const Tensor&, const OptionalTensor&,
                                                        const OptionalTensor&, double, double, string_view,
                                                        bool, string_view, double, double, bool, string_view,
                                                        bool, std::array<bool, 6>))
FGBG_OP(reconstruction_loss_backward_,
        void(at::TensorList, const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
             const Tensor&, const OptionalTensor&, const OptionalTensor&, double, double, string_view, bool,
             string_view, double, double, bool, string_view, std::array<bool, 6>))

#undef FGBG_OP

// The eager entries of the ops whose forward pass can write gradients, or what they are made of, too.
Tensor reparameterize_eager(const Tensor& mu, const Tensor& logvar, const Tensor& seed, c10::SymInt offset,
                            OptionalSymInt samples);
std::tuple<Tensor, Tensor> sample_gaussian_eager(const Tensor& mu, const Tensor& logvar,
                                                 const OptionalTensor& prior_mu,
                                                 const OptionalTensor& prior_logvar, const Tensor& seed,
                                                 c10::SymInt offset, OptionalSymInt samples,
                                                 string_view reduction);
Tensor gaussian_kl_eager(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                         const OptionalTensor& prior_logvar, string_view reduction);
Tensor bernoulli_kl_eager(const Tensor& logits, const OptionalTensor& prior, double prior_logit,
                          string_view reduction);
std::tuple<Tensor, Tensor> reconstruction_loss_eager(
    const Tensor& fg, const OptionalTensor& bg, const Tensor& target, const Tensor& mask,
    const OptionalTensor& fg_scale, const OptionalTensor& bg_scale, double fg_scale_value,
    double bg_scale_value, string_view composition, bool mask_is_logits, string_view likelihood,
    double fg_weight, double bg_weight, bool normalize_area, string_view reduction, bool return_terms);

}  // namespace fgbg::ops
