"""Loads the compiled extension and gives its dispatcher ops what C++ does not: shapes for tracing
(fake kernels) and, for double backward, derivatives of the backward ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference


def _load() -> tuple[Any, str | None]:
    try:
        from . import _build
    except ImportError as error:
        raise ImportError(
            "fgbg_cuda is not built: install it with `pip install --no-build-isolation .`"
        ) from error
    if _build.TORCH_VERSION != torch.__version__:
        raise ImportError(
            f"fgbg_cuda was built for torch {_build.TORCH_VERSION} but torch {torch.__version__} is "
            "running: reinstall it with `pip install --no-build-isolation --force-reinstall "
            "--no-deps .`"
        )
    from . import _C

    return _C, _build.CUDA_MISSING


_C, CUDA_MISSING = _load()
HAS_CUDA_KERNELS: bool = _C.build_info()["cuda"] is not None


# --- fake kernels: shapes, dtypes and strides of the results ---------------------------------------


def _fake(name: str) -> Callable:
    return torch.library.register_fake(f"fgbg::{name}")


def _loss_like(x: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    if reduction == "none":
        return torch.empty_like(x, dtype=dtype)
    return x.new_empty((x.shape[0],) if reduction == "sample" else (), dtype=dtype)


def _gradients(tensors: tuple[Tensor | None, ...], needs: list[bool]) -> tuple[Tensor, ...]:
    first = tensors[0]
    return tuple(
        torch.empty_like(t) if need and t is not None else first.new_empty(0)
        for t, need in zip(tensors, needs, strict=True)
    )


@_fake("philox_normal")
def _(seed, size, offset, dtype):
    return seed.new_empty(size, dtype=dtype)


@_fake("reparameterize")
def _fake_z(mu, logvar, seed, offset, num_samples):
    dtype = torch.promote_types(mu.dtype, logvar.dtype)
    if num_samples is None:
        return torch.empty_like(mu, dtype=dtype)
    return mu.new_empty((num_samples, *mu.shape), dtype=dtype)


@_fake("gaussian_kl")
def _fake_kl(mu, logvar, prior_mu, prior_logvar, reduction):
    return _loss_like(mu, reduction, reference.compute_dtype(mu, logvar, prior_mu, prior_logvar))


@_fake("sample_gaussian")
def _(mu, logvar, prior_mu, prior_logvar, seed, offset, num_samples, reduction):
    z = _fake_z(mu, logvar, seed, offset, num_samples)
    return z, _fake_kl(mu, logvar, prior_mu, prior_logvar, reduction)


@_fake("bernoulli_kl")
def _(logits, prior_logits, prior_logit, reduction):
    return _loss_like(logits, reduction, reference.compute_dtype(logits, prior_logits))


@_fake("reconstruction_loss")
def _fake_reconstruction(fg, bg, target, mask, fg_scale, bg_scale, fg_scale_value, bg_scale_value,
      composition, mask_is_logits, likelihood, fg_weight, bg_weight, normalize_area, reduction,
      return_terms):  # fmt: skip
    dtype = reference.compute_dtype(fg, bg, target, mask, fg_scale, bg_scale)
    if reduction == "none" and composition == "mixture_joint":
        loss = fg.new_empty(mask.shape, dtype=dtype)
    else:
        loss = _loss_like(fg, reduction, dtype)
    wants_terms = composition == "masked" and (return_terms or normalize_area)
    return loss, fg.new_empty((4, fg.shape[0]) if wants_terms else (0,), dtype=dtype)


@_fake("reparameterize_backward")
def _(grad_z, mu, logvar, seed, offset, num_samples, needs):
    return _gradients((mu, logvar), needs)


@_fake("gaussian_kl_backward")
def _(grad_kl, mu, logvar, prior_mu, prior_logvar, reduction, needs):
    return _gradients((mu, logvar, prior_mu, prior_logvar), needs)


@_fake("sample_gaussian_backward")
def _(grad_z, grad_kl, mu, logvar, prior_mu, prior_logvar, seed, offset, num_samples, reduction,
      needs):  # fmt: skip
    return _gradients((mu, logvar, prior_mu, prior_logvar), needs)


@_fake("bernoulli_kl_backward")
def _(grad_kl, logits, prior_logits, prior_logit, reduction, needs):
    return _gradients((logits, prior_logits), needs)


@_fake("reconstruction_loss_backward")
def _(grad_loss, grad_terms, terms, fg, bg, target, mask, fg_scale, bg_scale, fg_scale_value,
      bg_scale_value, composition, mask_is_logits, likelihood, fg_weight, bg_weight, normalize_area,
      reduction, needs):  # fmt: skip
    return _gradients((fg, bg, target, mask, fg_scale, bg_scale), needs)


# Eager calls alone reach these; under tracing the plain forward and backward ops are recorded.


def _needed(tensors: tuple[Tensor | None, ...], needs: list[bool]) -> list[Tensor]:
    return [torch.empty_like(t) for t, need in zip(tensors, needs, strict=True) if need and t is not None]


def _fake_kept(logvar):
    return logvar.new_empty(0) if logvar.is_cuda else torch.empty_like(logvar)


@_fake("reparameterize_with_gradient")
def _(mu, logvar, seed, offset):
    return _fake_z(mu, logvar, seed, offset, None), _fake_kept(logvar)


@_fake("sample_gaussian_with_gradient")
def _(mu, logvar, prior_mu, prior_logvar, seed, offset, reduction):
    z = _fake_z(mu, logvar, seed, offset, None)
    kl = _fake_kl(mu, logvar, prior_mu, prior_logvar, reduction)
    return z, kl, _fake_kept(logvar)


@_fake("sample_gaussian_backward_")
def _(dz_dlogvar, grad_z, grad_kl, mu, logvar, prior_mu, prior_logvar, reduction, needs):
    d_mu, _, d_prior_mu, d_prior_logvar = _gradients((mu, logvar, prior_mu, prior_logvar), needs)
    return d_mu, d_prior_mu, d_prior_logvar


@_fake("gaussian_kl_with_gradients")
def _(mu, logvar, prior_mu, prior_logvar, reduction, needs):
    kl = _fake_kl(mu, logvar, prior_mu, prior_logvar, reduction)
    return kl, _needed((mu, logvar, prior_mu, prior_logvar), needs)


@_fake("bernoulli_kl_with_gradients")
def _(logits, prior_logits, prior_logit, reduction, needs):
    kl = _loss_like(logits, reduction, reference.compute_dtype(logits, prior_logits))
    return kl, _needed((logits, prior_logits), needs)


@_fake("reconstruction_loss_with_gradients")
def _(*args):
    *loss_args, needs = args
    fg, bg, target, mask, fg_scale, bg_scale = args[:6]
    return *_fake_reconstruction(*loss_args), _needed((fg, bg, target, mask, fg_scale, bg_scale), needs)


for _name in ("gaussian_kl", "bernoulli_kl", "reconstruction_loss"):
    _fake(f"{_name}_backward_")(lambda *args: None)


# --- derivatives of the backward ops --------------------------------------------------------------


def _differentiable(name: str, split: Callable) -> None:
    """Gives ``fgbg::name`` its derivative: that of the specification's own gradient.

    ``split(*args)`` returns what the backward op differentiates: (upstream gradients, inputs,
    function from inputs to outputs), with None for what is absent.
    """

    def setup_context(ctx, inputs, output):
        ctx.args = [None if isinstance(a, Tensor) else a for a in inputs]
        ctx.tensor_positions = [i for i, a in enumerate(inputs) if isinstance(a, Tensor)]
        ctx.save_for_backward(*(inputs[i] for i in ctx.tensor_positions))

    def backward(ctx, *grad_outputs):
        args = list(ctx.args)
        with torch.enable_grad():
            for i, t in zip(ctx.tensor_positions, ctx.saved_tensors, strict=True):
                if t.is_floating_point():
                    # An alias, so that derivatives are partial: in the outer graph the upstream gradient
                    # may itself depend on the inputs. Higher orders still reach t through it.
                    t = t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
                args[i] = t
            upstream, inputs, forward = split(*args)
            needs = args[-1]
            outputs = forward(*inputs)
            live = [(o, g) for o, g in zip(outputs, upstream, strict=True) if g is not None]
            wanted = [i for i, need in enumerate(needs) if need and inputs[i] is not None]
            first = torch.autograd.grad(
                [o for o, _ in live],
                [inputs[i] for i in wanted],
                [g for _, g in live],
                create_graph=True,
                allow_unused=True,
            )
            pairs = [
                (f, grad_outputs[i])
                for f, i in zip(first, wanted, strict=True)
                if f is not None and f.requires_grad and grad_outputs[i] is not None
            ]
            targets = [i for i in ctx.tensor_positions if args[i].requires_grad]
            out: list[Tensor | None] = [None] * len(args)
            if pairs and targets:
                second = torch.autograd.grad(
                    [f for f, _ in pairs],
                    [args[i] for i in targets],
                    [g for _, g in pairs],
                    create_graph=torch.is_grad_enabled(),
                    allow_unused=True,
                )
                for i, g in zip(targets, second, strict=True):
                    out[i] = g
        return tuple(out)

    torch.library.register_autograd(f"fgbg::{name}", backward, setup_context=setup_context)


def _split_reparameterize(grad_z, mu, logvar, seed, offset, num_samples, needs):
    def forward(mu, logvar):
        return (reference.reparameterize(mu, logvar, seed, offset, num_samples),)

    return (grad_z,), (mu, logvar), forward


def _split_gaussian_kl(grad_kl, mu, logvar, prior_mu, prior_logvar, reduction, needs):
    def forward(*inputs):
        return (reference.gaussian_kl(*inputs, reduction),)

    return (grad_kl,), (mu, logvar, prior_mu, prior_logvar), forward


def _split_sample_gaussian(grad_z, grad_kl, mu, logvar, prior_mu, prior_logvar, seed, offset,
                           num_samples, reduction, needs):  # fmt: skip
    def forward(*inputs):
        return reference.sample_gaussian(*inputs, seed, offset, num_samples, reduction)

    return (grad_z, grad_kl), (mu, logvar, prior_mu, prior_logvar), forward


def _split_bernoulli_kl(grad_kl, logits, prior_logits, prior_logit, reduction, needs):
    def forward(logits, prior_logits):
        return (reference.bernoulli_kl(logits, prior_logits, prior_logit, reduction),)

    return (grad_kl,), (logits, prior_logits), forward


def _split_reconstruction(grad_loss, grad_terms, terms, fg, bg, target, mask, fg_scale, bg_scale,
                          fg_scale_value, bg_scale_value, *options_and_needs):  # fmt: skip
    # `terms` is a function of the other inputs, which forward() computes anew.
    options = options_and_needs[:-1]

    def forward(fg, bg, target, mask, fg_scale, bg_scale):
        return reference.reconstruction_loss(
            fg, bg, target, mask,
            fg_scale_value if fg_scale is None else fg_scale,
            bg_scale_value if bg_scale is None else bg_scale,
            *options, True,
        )  # fmt: skip

    return (grad_loss, grad_terms), (fg, bg, target, mask, fg_scale, bg_scale), forward


_differentiable("reparameterize_backward", _split_reparameterize)
_differentiable("gaussian_kl_backward", _split_gaussian_kl)
_differentiable("sample_gaussian_backward", _split_sample_gaussian)
_differentiable("bernoulli_kl_backward", _split_bernoulli_kl)
_differentiable("reconstruction_loss_backward", _split_reconstruction)
