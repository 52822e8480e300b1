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

#include "ops/autograd.h"
#include "ops/bernoulli.h"
#include "ops/categorical.h"
#include "ops/gaussian.h"
#include "ops/log_prob.h"
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

// A float, or a tensor; None stands for `absent`.
ops::Number number(handle value, double absent = 1.0) {
  if (is_tensor(value)) return {absent, absent, THPVariable_Unpack(value.ptr())};
  return {absent, value.is_none() ? absent : value.cast<double>()};
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

// Kernels index up to kDims dimensions: latents of more become a matrix, whose rows are the samples.
template <class Op>
variable_list run_latents(Op op, int64_t batch_dims = 1) {
  if (op.like().dim() <= kDims) return run(op);
  op.check();
  const Tensor like = op.like();
  const at::ScalarType dtype = op.dtype();
  const at::IntArrayRef sizes = like.sizes(), batch = sizes.slice(0, static_cast<size_t>(batch_dims));
  const int64_t samples = c10::multiply_integers(batch), row = like.numel() / std::max<int64_t>(samples, 1);
  ops::for_tensors(op, [&](Tensor& t) {
    if (!t.defined()) return;
    if (t.numel() == 1 && like.numel() != 1)
      t = t.reshape({});   // a number, or the seed
    else if (t.dim() > 0)  // where it is broadcast, gradients add up in the type of the computation
      t = (t.sizes() == sizes ? t : t.to(dtype).expand_as(like)).reshape({samples, row});
  });
  if constexpr (requires { op.batch_dims; }) op.batch_dims = 1;
  variable_list out = run(op);
  for (Tensor& t : out) {
    std::vector<int64_t> whole(t.sizes().begin(), t.sizes().end() - std::min<int64_t>(t.dim(), 2));
    if (t.dim() == 1) whole.assign(batch.begin(), batch.end());
    if (t.dim() > 1) whole.insert(whole.end(), sizes.begin(), sizes.end());
    t = t.view(whole);
  }
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
Op latents(handle mu, handle logvar, handle parameterization) {
  Op op;
  op.mu = tensor("mu", mu);
  op.spread = tensor("logvar", logvar);
  op.parameterization = word<Parameterization>("parameterization", parameterization);
  return op;
}

template <class Op>
void set_kl(Op& op, handle prior_mu, handle prior_logvar, handle reduction, int64_t batch_dims) {
  op.prior_mu = number(prior_mu, 0.0);
  op.prior_spread = number(prior_logvar, 0.0);
  op.reduction = word<Reduction>("reduction", reduction);
  op.batch_dims = batch_dims;
}

py::object one(const variable_list& results) { return results.empty() ? py::none() : wrap(results[0]); }

py::object reparameterize(handle mu, handle logvar, handle parameterization, handle num_samples, handle seed,
                          int64_t offset) {
  auto op = latents<ops::Reparameterize>(mu, logvar, parameterization);
  set_draw(op, num_samples, seed, offset);
  return one(run_latents(std::move(op)));
}

py::object gaussian_kl(handle mu, handle logvar, handle prior_mu, handle prior_logvar,
                       handle parameterization, handle reduction, int64_t batch_dims) {
  auto op = latents<ops::GaussianKl>(mu, logvar, parameterization);
  set_kl(op, prior_mu, prior_logvar, reduction, batch_dims);
  return one(run_latents(std::move(op), batch_dims));
}

// For what is composed of several calls: says what is wrong before the first.
void check_gaussian_kl(handle mu, handle logvar, handle prior_mu, handle prior_logvar,
                       handle parameterization, handle reduction, int64_t batch_dims) {
  auto op = latents<ops::GaussianKl>(mu, logvar, parameterization);
  set_kl(op, prior_mu, prior_logvar, reduction, batch_dims);
  op.check();
}

py::object sample_gaussian(handle mu, handle logvar, handle prior_mu, handle prior_logvar,
                           handle parameterization, handle num_samples, handle seed, int64_t offset,
                           handle reduction, int64_t batch_dims) {
  auto op = latents<ops::SampleGaussian>(mu, logvar, parameterization);
  set_kl(op, prior_mu, prior_logvar, reduction, batch_dims);
  set_draw(op, num_samples, seed, offset);
  const auto out = run_latents(std::move(op), batch_dims);
  if (out.empty()) return py::none();
  return py::make_tuple(wrap(out[0]), wrap(out[1]));
}

py::object gaussian_log_prob(handle z, handle mu, handle logvar, handle parameterization, handle reduction,
                             int64_t batch_dims) {
  ops::GaussianLogProb op;
  op.z = tensor("z", z);
  op.mu = number(mu, 0.0);
  op.spread = number(logvar, 0.0);
  op.parameterization = word<Parameterization>("parameterization", parameterization);
  op.reduction = word<Reduction>("reduction", reduction);
  op.batch_dims = batch_dims;
  return one(run_latents(std::move(op), batch_dims));
}

py::object bernoulli_kl(handle logits, handle prior_logits, handle reduction, int64_t batch_dims) {
  ops::BernoulliKl op;
  op.logits = tensor("logits", logits);
  op.prior_logits = number(prior_logits, 0.0);
  op.reduction = word<Reduction>("reduction", reduction);
  op.batch_dims = batch_dims;
  return one(run_latents(std::move(op), batch_dims));
}

// A negative `dim` counts from the end. prior_logits: a tensor, or None.
py::object categorical_kl(handle logits, handle prior_logits, int64_t dim, handle reduction,
                          int64_t batch_dims) {
  ops::CategoricalKl op;
  op.logits = tensor("logits", logits);
  op.prior_logits = optional_tensor("prior_logits", prior_logits);
  op.dim = dim < 0 && dim >= -op.logits.dim() ? dim + op.logits.dim() : dim;
  op.reduction = word<Reduction>("reduction", reduction);
  op.batch_dims = batch_dims;
  const Tensor like = op.logits;
  if (like.dim() <= kDims) return one(run(op));
  // [samples, *before, outcomes, *after], with each part as one dimension.
  op.check();
  const at::IntArrayRef sizes = like.sizes();
  const auto product = [&](int64_t begin, int64_t end) {
    return c10::multiply_integers(sizes.slice(static_cast<size_t>(begin), static_cast<size_t>(end - begin)));
  };
  const std::array<int64_t, 4> four = {product(0, batch_dims), product(batch_dims, op.dim), sizes[op.dim],
                                       product(op.dim + 1, like.dim())};
  std::vector<int64_t> whole(sizes.begin(), sizes.end());
  whole.erase(whole.begin() + op.dim);
  op.logits = like.reshape(four);
  if (op.prior_logits.defined() && op.prior_logits.sizes() != sizes)
    op.prior_logits = op.prior_logits.to(op.dtype()).expand_as(like);
  if (op.prior_logits.defined()) op.prior_logits = op.prior_logits.reshape(four);
  op.dim = 2;
  op.batch_dims = 1;
  variable_list out = run(op);
  if (!out.empty() && out[0].dim() > 0) {
    if (out[0].dim() == 1) whole.resize(static_cast<size_t>(batch_dims));
    out[0] = out[0].view(whole);
  }
  return one(out);
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
  m.def("gaussian_log_prob", gaussian_log_prob);
  m.def("bernoulli_kl", bernoulli_kl);
  m.def("categorical_kl", categorical_kl);
  m.def("reconstruction_loss", reconstruction_loss);
  m.def("slot_loss", slot_loss);
}

}  // namespace fgbg
