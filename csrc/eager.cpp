// The eager way: from the arguments of a Python call to the struct of an op, whose check() says what is wrong
// with its tensors, and on to the kernel. Each function is the namesake of one in the package functional, and
// returns None where kernels cannot go (torch.func transforms, forward-mode AD, other devices): there Python
// takes reference.py.
#include "eager.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Device.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>

#include <limits>

#include "ops/bernoulli.h"
#include "ops/gaussian.h"
#include "ops/philox.h"
#include "ops/reconstruction.h"
#include "ops/slots.h"

namespace fgbg {
namespace {

namespace py = pybind11;
using at::Tensor;
using ops::variable_list;
using py::handle;

std::string type_name(handle value) { return py::str(py::type::of(value).attr("__name__")); }
std::string text_of(handle value) { return py::str(value); }

// --- arguments ------------------------------------------------------------------------------------

bool is_tensor(handle value) { return THPVariable_Check(value.ptr()); }

const Tensor& tensor(const char* name, handle value) {
  TORCH_CHECK_TYPE(is_tensor(value), name, " must be a tensor, got ", type_name(value));
  return THPVariable_Unpack(value.ptr());
}

Tensor optional_tensor(const char* name, handle value) {
  return value.is_none() ? Tensor() : tensor(name, value);
}

template <class Word>
Word word(const char* name, handle value) {
  TORCH_CHECK_TYPE(PyUnicode_Check(value.ptr()), name, " must be one of ", ops::words<Word>(), ", got ",
                   type_name(value));
  Py_ssize_t size = 0;
  const char* data = PyUnicode_AsUTF8AndSize(value.ptr(), &size);
  if (!data) throw py::error_already_set();
  return ops::parse<Word>(name, {data, static_cast<size_t>(size)});
}

// A float, or a tensor.
ops::Number number(handle value) {
  if (is_tensor(value)) return {1.0, 1.0, THPVariable_Unpack(value.ptr())};
  return {1.0, value.cast<double>()};
}

// Drawn here and not in the op: the op stays pure, so that a compiler that merges equal calls cannot merge
// two samples, and torch.manual_seed governs the draw.
Tensor seed_tensor(handle seed, const at::Device& device, bool directly) {
  const auto options = at::TensorOptions().dtype(at::kLong);
  if (is_tensor(seed)) {
    const Tensor& tensor = THPVariable_Unpack(seed.ptr());
    // Without dimensions it may stand beside tensors of another device everywhere in torch.
    return tensor.is_cpu() && !device.is_cpu() && tensor.numel() == 1 ? tensor.reshape({}) : tensor;
  }
  if (directly) {
    // On the CPU, whatever the device: kernels take it as a number, without a launch to fill a tensor.
    if (!seed.is_none()) return at::scalar_tensor(seed.cast<int64_t>(), options);
#ifdef FGBG_WITH_CUDA
    if (device.is_cuda())
      if (const auto drawn = ops::draw_cuda_seed(device)) return at::scalar_tensor(*drawn, options);
#endif
  }
  // Where the call is traced, the draw is part of what is traced.
  if (seed.is_none()) return at::randint(std::numeric_limits<int64_t>::max(), {}, options.device(device));
  return at::full({}, seed.cast<int64_t>(), options.device(device));
}

py::object wrap(const Tensor& t) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(t)); }

// --- calls ----------------------------------------------------------------------------------------

bool kernels_can_run(const at::Device& device) {
  return ops::has_kernels(device) &&
         !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !torch::autograd::ForwardADLevel::try_get_by_idx(0);
}

// Checks the call and runs it; no results where kernels cannot run.
template <class Op>
variable_list run(const Op& op) {
  op.check();
  if (!kernels_can_run(op.like().device())) return {};
  const py::gil_scoped_release release;
  return ops::call(op);
}

// Kernels index up to kDims dimensions: of latents of more, all but the batch become one.
template <class Op>
variable_list run_latents(Op op) {
  if (op.like().dim() <= kDims) return run(op);
  op.check();
  const auto sizes = op.like().sizes().vec();
  ops::for_tensors(op, [](Tensor& t) {
    if (t.defined() && t.dim() > kDims) t = t.flatten(1);
  });
  variable_list out = run(op);
  for (Tensor& t : out)
    if (t.dim() > 1) t = t.unflatten(-1, at::IntArrayRef(sizes).slice(1));
  return out;
}

py::object philox_normal(handle seed, const py::tuple& size, int64_t offset, handle dtype, handle device) {
  c10::SymDimVector sizes;
  for (const handle n : size) sizes.emplace_back(n.cast<int64_t>());
  TORCH_CHECK_TYPE(THPDtype_Check(dtype.ptr()), "dtype is ", text_of(dtype), ", expected one of ",
                   ops::float_names());
  const auto type = reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type;
  at::Device where = at::kCPU;
  if (THPDevice_Check(device.ptr())) {
    where = reinterpret_cast<THPDevice*>(device.ptr())->device;
  } else if (is_tensor(seed)) {
    where = THPVariable_Unpack(seed.ptr()).device();
  } else if (at::impl::PythonTorchFunctionTLS::stack_len() > 0) {  // a default device is a mode
    const auto chosen = py::module_::import("torch").attr("get_default_device")();
    where = reinterpret_cast<THPDevice*>(chosen.ptr())->device;
  }
  if (where.is_cuda() && !where.has_index()) where = c10::impl::getDeviceGuardImpl(where.type())->getDevice();
  const Tensor tensor = seed_tensor(seed, where, ops::callable_directly({}));
  TORCH_CHECK_VALUE(tensor.is_cpu() || tensor.device() == where, "seed is on ", tensor.device(),
                    ", expected the CPU or ", where);
  if (!kernels_can_run(where)) {
    ops::check_seed(tensor, {});
    return py::none();
  }
  Tensor out;
  {
    const py::gil_scoped_release release;
    static const auto op =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("fgbg::philox_normal", "")
            .typed<Tensor(const Tensor&, c10::SymIntArrayRef, c10::SymInt, at::ScalarType)>();
    out = ops::callable_directly({tensor}) ? ops::philox_normal(tensor, sizes, offset, type, where)
                                           : op.call(tensor.to(where), sizes, offset, type);
  }
  return wrap(out);
}

template <class Op>
void set_draw(Op& op, handle num_samples, handle seed, int64_t offset) {
  op.offset = offset;
  if (!num_samples.is_none()) op.num_samples = num_samples.cast<int64_t>();
  op.seed = seed_tensor(seed, op.mu.device(), ops::callable_directly({op.mu}));
}

template <class Op>
void set_prior(Op& op, handle prior_mu, handle prior_logvar) {
  op.prior_mu = optional_tensor("prior_mu", prior_mu);
  op.prior_logvar = optional_tensor("prior_logvar", prior_logvar);
}

template <class Op>
Op latents(handle mu, handle logvar) {
  Op op;
  op.mu = tensor("mu", mu);
  op.logvar = tensor("logvar", logvar);
  return op;
}

py::object reparameterize(handle mu, handle logvar, handle num_samples, handle seed, int64_t offset) {
  auto op = latents<ops::Reparameterize>(mu, logvar);
  set_draw(op, num_samples, seed, offset);
  const auto out = run_latents(std::move(op));
  return out.empty() ? py::object(py::none()) : wrap(out[0]);
}

py::object gaussian_kl(handle mu, handle logvar, handle prior_mu, handle prior_logvar, handle reduction) {
  auto op = latents<ops::GaussianKl>(mu, logvar);
  set_prior(op, prior_mu, prior_logvar);
  op.reduction = word<Reduction>("reduction", reduction);
  const auto out = run_latents(std::move(op));
  return out.empty() ? py::object(py::none()) : wrap(out[0]);
}

// For what is composed of several calls: says what is wrong before the first.
void check_gaussian_kl(handle mu, handle logvar, handle prior_mu, handle prior_logvar, handle reduction) {
  auto op = latents<ops::GaussianKl>(mu, logvar);
  set_prior(op, prior_mu, prior_logvar);
  op.reduction = word<Reduction>("reduction", reduction);
  op.check();
}

py::object sample_gaussian(handle mu, handle logvar, handle prior_mu, handle prior_logvar, handle num_samples,
                           handle seed, int64_t offset, handle reduction) {
  auto op = latents<ops::SampleGaussian>(mu, logvar);
  set_prior(op, prior_mu, prior_logvar);
  set_draw(op, num_samples, seed, offset);
  op.reduction = word<Reduction>("reduction", reduction);
  const auto out = run_latents(std::move(op));
  if (out.empty()) return py::none();
  return py::make_tuple(wrap(out[0]), wrap(out[1]));
}

py::object bernoulli_kl(handle logits, handle prior_logits, handle reduction) {
  ops::BernoulliKl op;
  op.logits = tensor("logits", logits);
  if (is_tensor(prior_logits))
    op.prior_logits = THPVariable_Unpack(prior_logits.ptr());
  else
    op.prior_logit.value = prior_logits.cast<double>();
  op.reduction = word<Reduction>("reduction", reduction);
  const auto out = run_latents(std::move(op));
  return out.empty() ? py::object(py::none()) : wrap(out[0]);
}

// The loss, or (loss, terms) where those are asked for.
py::object reconstruction_loss(handle fg, handle bg, handle target, handle mask, handle mask_logits,
                               handle fg_scale, handle bg_scale, handle weight, std::string_view composition,
                               handle likelihood, double fg_weight, double bg_weight, bool normalize_area,
                               handle reduction, bool return_terms) {
  ops::ReconstructionLoss op;
  op.composition = ops::parse<Composition>("composition", composition);
  const bool plain = op.composition == Composition::plain;
  op.fg = tensor(plain ? "prediction" : "fg", fg);
  op.bg = optional_tensor("bg", bg);
  op.target = tensor("target", target);
  op.mask_is_logits = mask.is_none() && !plain;
  if (!plain) op.mask = op.mask_is_logits ? tensor("mask_logits", mask_logits) : tensor("mask", mask);
  op.fg_scale = number(fg_scale);
  op.bg_scale = number(bg_scale);
  op.weight = optional_tensor("weight", weight);
  op.fg_weight.value = fg_weight;
  op.bg_weight.value = bg_weight;
  op.likelihood = word<Likelihood>("likelihood", likelihood);
  op.normalize_area = normalize_area;
  op.reduction = word<Reduction>("reduction", reduction);
  op.return_terms = return_terms;
  const auto out = run(op);
  if (out.empty()) return py::none();
  return return_terms ? py::object(py::make_tuple(wrap(out[0]), wrap(out[1]))) : wrap(out[0]);
}

// The loss, or (loss, responsibilities) where those are asked for.
py::object slot_loss(handle slots, handle target, handle mask_logits, handle log_mask, handle scale,
                     handle weight, std::string_view composition, handle likelihood, handle reduction,
                     bool return_responsibilities) {
  ops::SlotLoss op;
  op.slots = tensor("slots", slots);
  op.target = tensor("target", target);
  op.mask_is_logits = log_mask.is_none();
  op.mask = op.mask_is_logits ? tensor("mask_logits", mask_logits) : tensor("log_mask", log_mask);
  op.scale = number(scale);
  op.weight = optional_tensor("weight", weight);
  op.composition = ops::parse<Composition>("composition", composition);
  op.likelihood = word<Likelihood>("likelihood", likelihood);
  op.reduction = word<Reduction>("reduction", reduction);
  op.return_responsibilities = return_responsibilities;
  const auto out = run(op);
  if (out.empty()) return py::none();
  return return_responsibilities ? py::object(py::make_tuple(wrap(out[0]), wrap(out[1]))) : wrap(out[0]);
}

}  // namespace

void bind_eager(py::module_& m) {
  // Before pybind11's own translator, which would make every c10::Error a RuntimeError.
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (python_error& e) {
      e.restore();  // from a hook in Python, as activation checkpointing has
    } catch (const c10::ValueError& e) {
      PyErr_SetString(PyExc_ValueError, e.what_without_backtrace());
    } catch (const c10::TypeError& e) {
      PyErr_SetString(PyExc_TypeError, e.what_without_backtrace());
    } catch (const c10::Error& e) {
      PyErr_SetString(PyExc_RuntimeError, e.what_without_backtrace());
    }
  });

  m.def("philox_normal", philox_normal);
  m.def("reparameterize", reparameterize);
  m.def("gaussian_kl", gaussian_kl);
  m.def("check_gaussian_kl", check_gaussian_kl);
  m.def("sample_gaussian", sample_gaussian);
  m.def("bernoulli_kl", bernoulli_kl);
  m.def("reconstruction_loss", reconstruction_loss);
  m.def("slot_loss", slot_loss);
}

}  // namespace fgbg
