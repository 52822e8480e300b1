"""Loads the compiled extension and gives its dispatcher ops what C++ does not: derivatives of the backward
ops, for double backward."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import reference


def _why_not_built() -> str:
    here = Path(__file__).parent
    for folder in sys.path:
        installed = Path(folder, here.name)
        if (installed / "_build.py").exists():
            return (
                f"fgbg_cuda is read from its sources in {here}, which are not built and hide the installed "
                f"package {installed}: start Python in another folder, and take {here.parent} off PYTHONPATH"
            )
    return "fgbg_cuda is not built: install it with `pip install --no-build-isolation .` in a checkout"


def _check_build() -> str | None:
    """Why there are no CUDA kernels, if so; an ImportError of one sentence where nothing can be loaded."""
    try:
        from . import _build
    except ImportError as error:
        raise ImportError(_why_not_built()) from error
    if _build.TORCH_VERSION != torch.__version__:
        # Each option is needed: without it pip builds against another torch, takes a wheel that it built
        # before, installs another torch, or does nothing at all.
        raise ImportError(
            f"fgbg_cuda was built for torch {_build.TORCH_VERSION} but torch {torch.__version__} is running: "
            "build it again, with `pip install --no-build-isolation --no-cache-dir --no-deps "
            "--force-reinstall SOURCE` or `uv pip install --no-build-isolation --no-cache "
            "--reinstall-package fgbg_cuda SOURCE`, where SOURCE is what was installed at first: a folder, "
            "a URL or fgbg_cuda"
        )
    return _build.CUDA_MISSING


CUDA_MISSING = _check_build()

from . import _C as _C  # noqa: E402  (built for another torch, it would fail by a missing symbol)

HAS_CUDA_KERNELS: bool = _C.build_info()["cuda"] is not None


# --- derivatives of the backward ops --------------------------------------------------------------


# What a backward op differentiates: upstream gradients, inputs, and the function from inputs to outputs.
_Split = tuple[tuple[Tensor | None, ...], tuple[Any, ...], Callable[..., tuple[Tensor, ...]]]


def _differentiable(name: str, split: Callable[..., _Split]) -> None:
    """Gives ``fgbg::name`` its derivative: that of the specification's own gradient.

    ``split(*args)`` returns what the backward op differentiates: (upstream gradients, inputs,
    function from inputs to outputs), with None for what is absent.
    """

    def setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        ctx.args = [None if isinstance(a, Tensor) else a for a in inputs]
        ctx.tensor_positions = [i for i, a in enumerate(inputs) if isinstance(a, Tensor)]
        ctx.save_for_backward(*(inputs[i] for i in ctx.tensor_positions))

    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
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
            wanted = [i for i, x in enumerate(inputs) if needs >> i & 1 and x is not None]
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


def _split_reparameterize(grad_z, mu, spread, parameterization, seed, offset, num_samples, dz_dspread, needs):
    def forward(mu, spread):
        return (reference.reparameterize(mu, spread, parameterization, seed, offset, num_samples),)

    return (grad_z,), (mu, spread), forward


def _split_gaussian_kl(grad_kl, mu, spread, prior_mu, prior_spread, parameterization, reduction, batch_dims,
                       needs):  # fmt: skip
    def forward(mu, spread, prior_mu, prior_spread):
        prior_mu = _or(prior_mu, 0.0)
        return (
            reference.gaussian_kl(
                mu, spread, prior_mu, prior_spread, parameterization, reduction, batch_dims
            ),
        )

    return (grad_kl,), (mu, spread, prior_mu, prior_spread), forward


def _split_sample_gaussian(grad_z, grad_kl, mu, spread, prior_mu, prior_spread, parameterization, seed,
                           offset, num_samples, reduction, batch_dims, dz_dspread, needs):  # fmt: skip
    def forward(mu, spread, prior_mu, prior_spread):
        return reference.sample_gaussian(
            mu, spread, _or(prior_mu, 0.0), prior_spread, parameterization, seed, offset, num_samples,
            reduction, batch_dims,
        )  # fmt: skip

    return (grad_z, grad_kl), (mu, spread, prior_mu, prior_spread), forward


def _split_gaussian_log_prob(grad, z, mu, spread, parameterization, reduction, batch_dims, needs):
    def forward(z, mu, spread):
        return (
            reference.gaussian_log_prob(z, _or(mu, 0.0), spread, parameterization, reduction, batch_dims),
        )

    return (grad,), (z, mu, spread), forward


def _split_bernoulli_kl(grad_kl, logits, prior_logits, reduction, batch_dims, needs):
    def forward(logits, prior_logits):
        return (reference.bernoulli_kl(logits, _or(prior_logits, 0.0), reduction, batch_dims),)

    return (grad_kl,), (logits, prior_logits), forward


def _split_categorical_kl(grad_kl, logits, prior_logits, dim, reduction, batch_dims, needs):
    def forward(logits, prior_logits):
        return (reference.categorical_kl(logits, prior_logits, dim, reduction, batch_dims),)

    return (grad_kl,), (logits, prior_logits), forward


def _split_reconstruction(
    grad_loss, grad_terms, fg, bg, target, mask, fg_scale, bg_scale, weight, composition, mask_is_logits,
    likelihood, fg_weight, bg_weight, normalize_area, reduction, return_terms, terms, needs,
):  # fmt: skip
    # `terms` is a function of the other inputs, which forward() computes anew.
    def forward(fg, bg, target, mask, fg_scale, bg_scale, weight):
        return reference.reconstruction_loss(
            fg, bg, target, mask, _or(fg_scale, 1.0), _or(bg_scale, 1.0), weight, composition,
            mask_is_logits, likelihood, _or(fg_weight, 1.0), _or(bg_weight, 1.0), normalize_area, reduction,
            True,
        )  # fmt: skip

    return (grad_loss, grad_terms), (fg, bg, target, mask, fg_scale, bg_scale, weight), forward


def _split_slots(
    grad_loss, grad_responsibilities, slots, target, mask, scale, weight, composition, mask_is_logits,
    likelihood, reduction, return_responsibilities, needs,
):  # fmt: skip
    def forward(slots, target, mask, scale, weight):
        return reference.slot_loss(
            slots, target, mask, _or(scale, 1.0), weight, composition, mask_is_logits, likelihood, reduction
        )[:1]

    return (grad_loss,), (slots, target, mask, scale, weight), forward


def _or(value: Tensor | None, absent: float) -> Tensor | float:
    return absent if value is None else value


_differentiable("reparameterize_backward", _split_reparameterize)
_differentiable("gaussian_kl_backward", _split_gaussian_kl)
_differentiable("sample_gaussian_backward", _split_sample_gaussian)
_differentiable("gaussian_log_prob_backward", _split_gaussian_log_prob)
_differentiable("bernoulli_kl_backward", _split_bernoulli_kl)
_differentiable("categorical_kl_backward", _split_categorical_kl)
_differentiable("reconstruction_loss_backward", _split_reconstruction)
_differentiable("slot_loss_backward", _split_slots)
