// The short way for the ordinary call: plain float tensors, options as they mostly are, no transform. Each
// function here does for such a call what its namesake in functional.py does, in a fraction of the time, and
// returns None for every other, right or wrong: that is then checked, explained and handled in Python. What
// is accepted here must be what is accepted there.
#include "ordinary.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Device.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "ops/autograd.h"
#include "ops/common.h"

namespace fgbg {
namespace {

using at::Tensor;
using ops::OptionalTensor;
using py::handle;
using std::string_view;

bool is_float(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble;
}

bool has_kernels(const at::Device& device) {
#ifdef FGBG_WITH_CUDA
  if (device.is_cuda()) return true;
#endif
  return device.is_cpu();
}

// No torch.func transform, forward-mode AD or mode that looks at Python's calls.
bool undisturbed() {
  return !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !torch::autograd::ForwardADLevel::try_get_by_idx(0) &&
         at::impl::PythonTorchFunctionTLS::stack_len() == 0;
}

const Tensor* plain(handle value) {
  if (!THPVariable_CheckExact(value.ptr())) return nullptr;
  const Tensor& t = THPVariable_Unpack(value.ptr());
  return t.layout() == at::kStrided && !t.is_nested() ? &t : nullptr;
}

// A float tensor of the shape and on the device of another.
const Tensor* like(handle value, const Tensor& other) {
  const Tensor* t = plain(value);
  return t && is_float(t->scalar_type()) && t->sizes() == other.sizes() && t->device() == other.device()
             ? t
             : nullptr;
}

// Whether the arguments are plain float tensors of one shape on one device. The checks in Python, which say
// what is wrong, take longer to find nothing.
bool alike(const py::args& values) {
  const Tensor* first = values.empty() ? nullptr : plain(values[0]);
  return first &&
         std::all_of(values.begin(), values.end(), [&](handle v) { return like(v, *first) != nullptr; });
}

std::optional<int64_t> integer(handle value, int64_t minimum) {
  if (!PyLong_CheckExact(value.ptr())) return {};
  int overflow = 0;
  const int64_t n = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
  if (overflow != 0 || n < minimum) return {};
  return n;
}

std::optional<double> number(handle value) {
  if (!PyFloat_CheckExact(value.ptr())) return {};
  const double x = PyFloat_AS_DOUBLE(value.ptr());
  if (!std::isfinite(x)) return {};
  return x;
}

string_view text(handle value) {
  if (!PyUnicode_CheckExact(value.ptr())) return {};
  Py_ssize_t size = 0;
  const char* data = PyUnicode_AsUTF8AndSize(value.ptr(), &size);
  if (!data) PyErr_Clear();
  return data ? string_view(data, static_cast<size_t>(size)) : string_view();
}

// mu, logvar and priors of at most as many dimensions as the kernels take.
struct Latents {
  const Tensor *mu = nullptr, *logvar = nullptr;
  OptionalTensor prior_mu, prior_logvar;

  static std::optional<Latents> of(handle mu, handle logvar, handle prior_mu, handle prior_logvar) {
    Latents x;
    x.mu = plain(mu);
    if (!x.mu || !undisturbed() || !is_float(x.mu->scalar_type()) || !has_kernels(x.mu->device()) ||
        x.mu->dim() < 1 || x.mu->dim() > kDims)
      return {};
    x.logvar = like(logvar, *x.mu);
    if (!x.logvar) return {};
    for (const auto& [value, prior] :
         {std::pair(prior_mu, &x.prior_mu), std::pair(prior_logvar, &x.prior_logvar)}) {
      if (value.is_none()) continue;
      const Tensor* t = like(value, *x.mu);
      if (!t) return {};
      *prior = *t;
    }
    return x;
  }
};

// The seed tensor: what was given, or drawn from the default generator.
std::optional<Tensor> seed_tensor(handle seed, const at::Device& device) {
  const auto options = at::TensorOptions().dtype(at::kLong).device(device);
  if (seed.is_none()) return at::randint(std::numeric_limits<int64_t>::max(), {1}, options);
  if (const Tensor* t = plain(seed)) {
    if (t->scalar_type() != at::kLong || t->numel() != 1 || t->device() != device) return {};
    return *t;
  }
  const auto n = integer(seed, std::numeric_limits<int64_t>::min());
  if (!n) return {};
  return at::full({1}, *n, options);
}

struct Draw {
  Tensor seed;
  int64_t offset;
  ops::OptionalSymInt samples;

  static std::optional<Draw> of(handle num_samples, handle seed, handle offset, handle generator,
                                const Tensor& mu) {
    const auto from = integer(offset, 0);
    if (!from || !generator.is_none()) return {};
    Draw draw{{}, *from, {}};
    if (!num_samples.is_none()) {
      const auto samples = integer(num_samples, 1);
      if (!samples) return {};
      draw.samples = *samples;
    }
    auto tensor = seed_tensor(seed, mu.device());
    if (!tensor) return {};
    draw.seed = *tensor;
    return draw;
  }
};

py::object wrap(const Tensor& t) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(t)); }

py::object reparameterize(handle mu, handle logvar, handle num_samples, handle seed, handle offset,
                          handle generator) {
  const auto x = Latents::of(mu, logvar, py::none(), py::none());
  if (!x) return py::none();
  const auto draw = Draw::of(num_samples, seed, offset, generator, *x->mu);
  if (!draw) return py::none();
  Tensor z;
  {
    const py::gil_scoped_release release;
    z = ops::reparameterize_eager(*x->mu, *x->logvar, draw->seed, draw->offset, draw->samples);
  }
  return wrap(z);
}

// A reduced KL without a floor.
bool ordinary_kl(string_view reduction, handle free_bits) {
  return ops::is_reduction(reduction) && reduction != "none" && number(free_bits) == 0.0;
}

py::object gaussian_kl(handle mu, handle logvar, handle prior_mu, handle prior_logvar, handle reduction,
                       handle free_bits) {
  const auto x = Latents::of(mu, logvar, prior_mu, prior_logvar);
  if (!x || !ordinary_kl(text(reduction), free_bits)) return py::none();
  Tensor kl;
  {
    const string_view name = text(reduction);
    const py::gil_scoped_release release;
    kl = ops::gaussian_kl_eager(*x->mu, *x->logvar, x->prior_mu, x->prior_logvar, name);
  }
  return wrap(kl);
}

py::object sample_gaussian(handle mu, handle logvar, handle prior_mu, handle prior_logvar, handle num_samples,
                           handle seed, handle offset, handle generator, handle reduction, handle free_bits) {
  const auto x = Latents::of(mu, logvar, prior_mu, prior_logvar);
  if (!x || !ordinary_kl(text(reduction), free_bits)) return py::none();
  const auto draw = Draw::of(num_samples, seed, offset, generator, *x->mu);
  if (!draw) return py::none();
  Tensor z, kl;
  {
    const string_view name = text(reduction);
    const py::gil_scoped_release release;
    std::tie(z, kl) = ops::sample_gaussian_eager(*x->mu, *x->logvar, x->prior_mu, x->prior_logvar, draw->seed,
                                                 draw->offset, draw->samples, name);
  }
  return py::make_tuple(wrap(z), wrap(kl));
}

// Where a tensor is to be: "cpu", or what a torch.device says, or by default the device of the seed.
std::optional<at::Device> place(handle device, const Tensor* seed) {
  if (device.is_none()) return seed ? seed->device() : at::Device(at::kCPU);
  if (THPDevice_Check(device.ptr())) return reinterpret_cast<THPDevice*>(device.ptr())->device;
  if (text(device) == "cpu") return at::Device(at::kCPU);
  return {};
}

py::object philox_normal(handle seed, handle size, handle offset, handle dtype, handle device) {
  const auto from = integer(offset, 0);
  if (!from || !undisturbed() || seed.is_none() || !PyTuple_CheckExact(size.ptr()) ||
      !THPDtype_Check(dtype.ptr()))
    return py::none();
  std::vector<c10::SymInt> sizes;
  for (const handle n : py::reinterpret_borrow<py::tuple>(size)) {
    const auto extent = integer(n, 0);
    if (!extent) return py::none();
    sizes.emplace_back(*extent);
  }
  const auto where = place(device, plain(seed));
  const auto type = reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type;
  if (!where || !has_kernels(*where) || !is_float(type)) return py::none();
  const auto tensor = seed_tensor(seed, *where);
  if (!tensor) return py::none();
  Tensor out;
  {
    const py::gil_scoped_release release;
    out = ops::philox_normal_op().call(*tensor, sizes, *from, type);
  }
  return wrap(out);
}

// A loss that is reduced, with numbers for scales and without terms; `composition` comes from functional.py.
py::object reconstruction_loss(handle fg, handle bg, handle target, handle mask, handle mask_logits,
                               handle fg_scale, handle bg_scale, string_view composition, handle likelihood,
                               handle fg_weight, handle bg_weight, handle reduction) {
  const Tensor* first = plain(fg);
  if (!first || !undisturbed() || !is_float(first->scalar_type()) || !has_kernels(first->device()) ||
      first->dim() < 3 || first->dim() > kDims || first->size(1) == 0 ||
      mask.is_none() == mask_logits.is_none())
    return py::none();
  OptionalTensor second;
  if (!bg.is_none()) {
    const Tensor* t = like(bg, *first);
    if (!t) return py::none();
    second = *t;
  } else if (composition != "masked") {
    return py::none();
  }
  const bool logits = mask.is_none();
  const Tensor *wanted = like(target, *first), *m = plain(logits ? mask_logits : mask);
  if (!wanted || !m || m->device() != first->device() || m->dim() != first->dim() ||
      m->size(0) != first->size(0) || m->sizes().slice(2) != first->sizes().slice(2))
    return py::none();
  const bool per_channel = m->size(1) != 1;
  if (per_channel && (m->size(1) != first->size(1) || composition == "mixture_joint")) return py::none();
  const auto type = m->scalar_type();
  if (!is_float(type) && (logits || (type != at::kBool && type != at::kByte))) return py::none();
  const auto fg_value = number(fg_scale), bg_value = number(bg_scale);
  const auto fg_factor = number(fg_weight), bg_factor = number(bg_weight);
  const string_view how = text(reduction), name = text(likelihood);
  if (!fg_value || !bg_value || !fg_factor || !bg_factor || !ops::is_reduction(how) || how == "none" ||
      !ops::is_likelihood(name))
    return py::none();
  if (ops::has_scale(ops::parse_likelihood(name)) ? *fg_value <= 0.0 || *bg_value <= 0.0
                                                  : *fg_value != 1.0 || *bg_value != 1.0)
    return py::none();
  Tensor loss;
  {
    const py::gil_scoped_release release;
    loss = std::get<0>(ops::reconstruction_loss_eager(*first, second, *wanted, *m, {}, {}, *fg_value,
                                                      *bg_value, composition, logits, name, *fg_factor,
                                                      *bg_factor, false, how, false));
  }
  return wrap(loss);
}

}  // namespace

void bind_ordinary(py::module_& module) {
  module.def("alike", alike);
  py::module_ m = module.def_submodule("ordinary");
  m.def("reparameterize", reparameterize);
  m.def("gaussian_kl", gaussian_kl);
  m.def("sample_gaussian", sample_gaussian);
  m.def("philox_normal", philox_normal);
  m.def("reconstruction_loss", reconstruction_loss);
}

}  // namespace fgbg
