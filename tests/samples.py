"""One table of sample calls, from which the tests of values, gradients, tracing, dtypes, layouts and
devices are generated. A row here is tested everywhere; so is a likelihood added to reference.py.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import fgbg_cuda
from fgbg_cuda import reference

# --- tensors --------------------------------------------------------------------------------------


def _empty_region(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Sample 0 is all background, sample 1 all foreground, the rest mixed."""
    mask = torch.rand(shape, dtype=torch.float64, generator=generator)
    mask[0], mask[1] = 0.0, 1.0
    return mask


def _coin(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randint(2, shape, generator=generator)


_KINDS: dict[str, Callable[[Sequence[int], torch.Generator], Tensor]] = {
    "real": lambda shape, g: torch.randn(shape, dtype=torch.float64, generator=g),
    "logits": lambda shape, g: 2 * torch.randn(shape, dtype=torch.float64, generator=g),
    "unit": lambda shape, g: 0.05 + 0.9 * torch.rand(shape, dtype=torch.float64, generator=g),
    "positive": lambda shape, g: 0.5 + torch.rand(shape, dtype=torch.float64, generator=g),
    "empty_region": _empty_region,
    "bool": lambda shape, g: _coin(shape, g).bool(),
    "bool_empty_region": lambda shape, g: _empty_region(shape, g) > 0.5,
    "uint8": lambda shape, g: _coin(shape, g).to(torch.uint8),
    "weight": lambda shape, g: torch.rand(shape, dtype=torch.float64, generator=g) + 0.2,
    # A third is negative, and a third 0, which leaves elements out: there a loss is no smooth function of it.
    "holes": lambda shape, g: (torch.randint(3, shape, generator=g) - 1).double(),
    # Along the slots where samples have one dimension. (Those that are excluded, -inf: test_slots.py.)
    "log_mask": lambda shape, g: torch.log_softmax(
        2 * torch.randn(shape, dtype=torch.float64, generator=g), 1
    ),
    "seed": lambda shape, g: torch.randint(2**63 - 1, shape, generator=g),
}


@dataclass(frozen=True)
class Make:
    """A tensor to be made: what its numbers are like, and its shape."""

    kind: str
    shape: tuple[int, ...]

    def __call__(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name}{self.kind}".encode()))
        return _KINDS[self.kind](self.shape, generator)


# --- samples --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A call of a public function: its tensors, by parameter name, and its other arguments."""

    op: str
    tensors: dict[str, Make]
    options: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    # False where a derivative jumps within the step of a finite difference.
    smooth: bool = True

    @property
    def id(self) -> str:
        scales = [f"{n}{list(m.shape)}" for n, m in self.tensors.items() if n.endswith("scale")]
        options = [f"{name}={value}" for name, value in self.options.items()]
        words = [self.op, *options, *scales, self.note]
        return "-".join(w.replace(" ", "") for w in words if w)

    @property
    def features(self) -> set[tuple[str, ...]]:
        """What :func:`covering` must show at least once: everything for some op, and for every op
        its reductions and optional tensors, on which the shapes of results and gradients depend."""
        anywhere = {(name, str(value)) for name, value in self.options.items() if name != "seed"}
        anywhere |= {(n, m.kind, str(len(m.shape))) for n, m in self.tensors.items() if n != "mu"}
        here = {(self.op, name) for name in (*self.tensors, *self.options)}
        return anywhere | here | {(self.op, "reduction", self.options.get("reduction", ""))}

    def inputs(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | Sequence[torch.dtype] = torch.float64,
        grad: bool = False,
    ) -> dict[str, Tensor]:
        """The tensors; float ones of `dtype`, or of several dtypes in turn."""
        dtypes = itertools.cycle([dtype] if isinstance(dtype, torch.dtype) else dtype)
        made = {}
        for name, make in self.tensors.items():
            value = make(name)
            if value.is_floating_point():
                value = value.to(device, next(dtypes)).requires_grad_(grad)
            made[name] = value.to(device)
        return made

    def __call__(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The public function's results, as a flat tuple."""
        return _flat(getattr(fgbg_cuda, self.op)(**inputs, **self.options))

    def expected(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The specification's results in float64. Its noise is the kernel's, which test_philox.py
        compares with the specification's: float32 Box-Muller would hide every other difference."""
        wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
        with mock.patch.object(reference, "philox_normal", _kernel_noise):
            return _flat(_SPECIFICATION[self.op](**wide, **self.options))


def _flat(results: Any) -> tuple[Tensor, ...]:
    if isinstance(results, Tensor):
        return (results,)
    return tuple(itertools.chain.from_iterable(_flat(r) for r in results))


def _kernel_noise(seed: Tensor, size: Sequence[int], offset: int, dtype: torch.dtype) -> Tensor:
    return fgbg_cuda.philox_normal(seed, size, offset=offset, dtype=dtype)


# --- the specification, called as the public functions are ----------------------------------------


def _seed(seed: Tensor | int, like: Tensor) -> Tensor:
    return seed if isinstance(seed, Tensor) else torch.tensor([seed], device=like.device)


def _reparameterize(mu, logvar, *, seed, parameterization="logvar", offset=0, num_samples=None):
    return reference.reparameterize(mu, logvar, parameterization, _seed(seed, mu), offset, num_samples)


def _gaussian_kl(
    mu, logvar, prior_mu=None, prior_logvar=None, *, parameterization="logvar", reduction="batchmean",
    free_bits=0.0, batch_dims=1,
):  # fmt: skip
    prior_mu = 0.0 if prior_mu is None else prior_mu
    operands = (mu, logvar, prior_mu, prior_logvar, parameterization)
    if free_bits == 0.0:
        return reference.gaussian_kl(*operands, reduction, batch_dims)
    kl = reference.gaussian_kl(*operands, "none").flatten(0, batch_dims - 1)
    per_dimension = torch.clamp(kl.mean(0), min=free_bits)
    return {
        "batchmean": per_dimension.sum(),
        "sum": per_dimension.sum() * len(kl),
        "mean": per_dimension.mean(),
    }[reduction]


def _sample_gaussian(
    mu, logvar, prior_mu=None, prior_logvar=None, *, seed, parameterization="logvar", offset=0,
    num_samples=None, **kl,
):  # fmt: skip
    draw = {"offset": offset, "num_samples": num_samples}
    z = _reparameterize(mu, logvar, seed=seed, parameterization=parameterization, **draw)
    return z, _gaussian_kl(mu, logvar, prior_mu, prior_logvar, parameterization=parameterization, **kl)


def _gaussian_log_prob(
    z, mu=0.0, logvar=None, *, parameterization="logvar", reduction="batchmean", batch_dims=1
):
    return reference.gaussian_log_prob(z, mu, logvar, parameterization, reduction, batch_dims)


def _bernoulli_kl(logits, prior_logits=0.0, *, reduction="batchmean", batch_dims=1):
    return reference.bernoulli_kl(logits, prior_logits, reduction, batch_dims)


def _categorical_kl(logits, prior_logits=0.0, *, dim=1, reduction="batchmean", batch_dims=1):
    prior = prior_logits if isinstance(prior_logits, Tensor) else None
    return reference.categorical_kl(logits, prior, dim, reduction, batch_dims)


def _reconstruction(prediction, target, *, likelihood="gaussian", scale=1.0, weight=None, **options):
    return _merged(
        prediction, None, target, None, scale, 1.0, weight, "plain", False, likelihood, **options
    )[0]  # fmt: skip


def _merged(
    fg, bg, target, mask, fg_scale, bg_scale, weight, composition, *words, batch_dims=1,
    reduction="batchmean", **options,
):  # fmt: skip
    """The specification of images with several dimensions of samples, or none of channels: all of them
    expanded, with the dimensions merged."""
    size = fg.shape
    joint = composition == "mixture_joint"

    def merge(t, per_channel=True):
        if not isinstance(t, Tensor) or t.dim() == 0 or (t.dim() == 1 and len(size) > batch_dims + 1):
            return t
        full = (*size[:batch_dims], 1, *size[batch_dims + 1 :]) if not per_channel else size
        t = t.expand(full).flatten(0, batch_dims - 1)
        return t.flatten(2) if t.dim() > 2 else t.reshape(t.shape[0], 1, *(t.shape[1:] or (1,)))

    if mask is not None:
        mask = mask.flatten(0, batch_dims - 1).flatten(2)
    loss, terms = reference.reconstruction_loss(
        merge(fg), merge(bg), merge(target), mask, merge(fg_scale), merge(bg_scale),
        merge(weight, not joint), composition, *words, reduction=reduction, **options,
    )  # fmt: skip
    if reduction == "sample":
        loss = loss.reshape(size[:batch_dims])
    if reduction == "none":
        loss = loss.reshape((*size[:batch_dims], 1, *size[batch_dims + 1 :]) if joint else size)
    return loss, [t.reshape(size[:batch_dims]) for t in terms] if terms.numel() else terms


def _masked(
    fg, bg=None, target=None, *, mask=None, mask_logits=None, likelihood="gaussian", fg_scale=1.0,
    bg_scale=1.0, fg_weight=1.0, bg_weight=1.0, weight=None, normalize=None, return_terms=False, **options,
):  # fmt: skip
    loss, terms = _merged(
        fg, bg, target, mask_logits if mask is None else mask, fg_scale, bg_scale, weight, "masked",
        mask is None, likelihood, fg_weight, bg_weight, normalize == "area", **options,
    )  # fmt: skip
    return (loss, tuple(terms[:3])) if return_terms else loss


def _blended(
    fg, bg, target, *, mask=None, mask_logits=None, likelihood="gaussian", scale=1.0, weight=None, **options
):  # fmt: skip
    return _merged(
        fg, bg, target, mask_logits if mask is None else mask, scale, 1.0, weight, "blended",
        mask is None, likelihood, **options,
    )[0]  # fmt: skip


def _mixture(
    fg, bg, target, *, mask_logits, likelihood="gaussian", fg_scale=1.0, bg_scale=1.0,
    channels="joint", weight=None, **options,
):  # fmt: skip
    return _merged(
        fg, bg, target, mask_logits, fg_scale, bg_scale, weight, f"mixture_{channels}", True, likelihood,
        **options,
    )[0]  # fmt: skip


def _slots(
    slots, target, *, composition, mask_logits=None, log_mask=None, likelihood="gaussian", scale=1.0,
    weight=None, reduction="batchmean", batch_dims=1, return_responsibilities=False,
):  # fmt: skip
    """The specification of losses of slots: with several dimensions of samples, all of them expanded and
    merged."""
    samples = slots.shape[:batch_dims]

    def merge(t, size):
        return t.expand(size).flatten(0, batch_dims - 1)

    blended = composition == "blended"
    mask = log_mask if mask_logits is None else mask_logits
    if isinstance(scale, Tensor) and scale.dim() > 1:
        scale = merge(scale, target.shape if blended else slots.shape)
    if weight is not None:
        joint = composition == "mixture_joint"
        size = (*target.shape[:batch_dims], 1, *target.shape[batch_dims + 1 :]) if joint else target.shape
        weight = merge(weight, size)
    loss, posterior = reference.slot_loss(
        slots.flatten(0, batch_dims - 1), target.flatten(0, batch_dims - 1), mask.flatten(0, batch_dims - 1),
        scale, weight, composition, mask_logits is not None, likelihood, reduction, return_responsibilities,
    )  # fmt: skip
    if reduction in ("none", "sample"):
        loss = loss.reshape(*samples, *loss.shape[1:])
    return (loss, posterior.reshape(*samples, *posterior.shape[1:])) if return_responsibilities else loss


def _slot_mixture(slots, target, *, channels="joint", **options):
    return _slots(slots, target, composition=f"mixture_{channels}", **options)


def _slot_blended(slots, target, **options):
    return _slots(slots, target, composition="blended", **options)


_SPECIFICATION: dict[str, Callable] = {
    "reparameterize": _reparameterize,
    "gaussian_kl": _gaussian_kl,
    "sample_gaussian": _sample_gaussian,
    "gaussian_log_prob": _gaussian_log_prob,
    "bernoulli_kl": _bernoulli_kl,
    "reconstruction_loss": _reconstruction,
    "categorical_kl": _categorical_kl,
    "masked_reconstruction_loss": _masked,
    "blended_reconstruction_loss": _blended,
    "mixture_reconstruction_loss": _mixture,
    "slot_mixture_loss": _slot_mixture,
    "slot_blended_loss": _slot_blended,
}

# --- the table: latents ---------------------------------------------------------------------------

_REDUCTIONS = ("batchmean", "none", "sample", "sum", "mean")
# Of rank 1 to 6; a rank above 5 is flattened on its way to the kernel.
_LATENT_SHAPES = ((5,), (3, 4), (2, 3, 3), (2, 1, 3, 2), (2, 2, 1, 3, 1), (2, 2, 1, 2, 1, 2))


def _latents(shape: tuple[int, ...], *priors: str) -> dict[str, Make]:
    names = ("mu", "logvar", *priors)
    return {name: Make("real", shape) for name in names}


def _reparameterize_samples() -> Iterable[Sample]:
    draws = ({}, {"num_samples": 3}, {"offset": 5}, {"num_samples": 1, "offset": 2**34 + 3})
    for i, (shape, more) in enumerate(zip(_LATENT_SHAPES, itertools.cycle(draws), strict=False)):
        yield Sample("reparameterize", _latents(shape), {"seed": i - 2, **more}, f"rank{len(shape)}")
    seeded = {**_latents((3, 5)), "seed": Make("seed", (1,))}
    yield Sample("reparameterize", seeded, note="seed_tensor")
    yield Sample(
        "reparameterize",
        {**_latents((2, 2, 1, 2, 1, 2)), "seed": Make("seed", ())},
        {"num_samples": 2},
        "seed_0d",
    )


_PRIORS = ((), ("prior_mu", "prior_logvar"), ("prior_mu",), ("prior_logvar",))


def _kl_options() -> Iterable[tuple[dict[str, Make], dict[str, Any], str]]:
    """Shapes, priors and reductions in turn, so that each meets several of the others."""
    for i in range(10):
        shape = _LATENT_SHAPES[(i + i // 6) % 6]
        priors = _PRIORS[(i + i // 5) % 4]
        options = {"reduction": _REDUCTIONS[i % 5]}
        if i >= 5 and options["reduction"] in ("batchmean", "sum", "mean"):
            # Between the KLs of the dimensions, so that some are floored and some are not.
            options["free_bits"] = 0.75
        note = f"rank{len(shape)}_{'_'.join(priors) or 'no_prior'}"
        yield _latents(shape, *priors), options, note


def _gaussian_kl_samples() -> Iterable[Sample]:
    for tensors, options, note in _kl_options():
        yield Sample("gaussian_kl", tensors, options, note)


def _sample_gaussian_samples() -> Iterable[Sample]:
    for i, (tensors, options, note) in enumerate(_kl_options()):
        draw: dict[str, Any] = {"seed": 17 * i - 40}
        if i % 3 == 1:
            draw["num_samples"] = 2
        if i % 3 == 2:
            draw["offset"] = i
        yield Sample("sample_gaussian", tensors, {**draw, **options}, note)


def _bernoulli_kl_samples() -> Iterable[Sample]:
    for i, reduction in enumerate(_REDUCTIONS):
        shape = _LATENT_SHAPES[i + 1]
        logits = {"logits": Make("logits", shape)}
        both = {**logits, "prior_logits": Make("logits", shape)}
        rank = f"rank{len(shape)}"
        yield Sample("bernoulli_kl", both, {"reduction": reduction}, f"prior_{rank}")
        prior = {"prior_logits": -1.5} if i % 2 else {}
        yield Sample("bernoulli_kl", logits, {**prior, "reduction": reduction}, rank)


# Priors and what else is broadcast: how many of the dimensions it has, and which of these are 1.
_BROADCASTS: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((3, 4), (4,)),
    ((3, 4), (3, 1)),
    ((2, 3, 4), (3, 4)),
    ((2, 3, 3), (1, 3, 1)),
    ((2, 3, 1, 2), ()),
    ((2, 2, 1, 3, 1), (2, 1, 1, 3, 1)),
    ((2, 2, 1, 2, 1, 2), (2, 1, 2)),
)
_PARAMETERIZATIONS = ("std", "log_std", "logvar")


def _spread(parameterization: str, shape: tuple[int, ...]) -> Make:
    return Make("positive" if parameterization == "std" else "real", shape)


def _parameterized_samples() -> Iterable[Sample]:
    """Every parameterization of the three functions, with priors that broadcast, numbers among them."""
    for i, parameterization in enumerate(_PARAMETERIZATIONS):
        word = {"parameterization": parameterization}
        draws = ({}, {"num_samples": 2}, {"offset": 3})[i]
        tensors = {"mu": Make("real", (3, 4)), "logvar": _spread(parameterization, (3, 4))}
        yield Sample("reparameterize", tensors, {"seed": i, **word, **draws}, "parameterized")
        yield Sample("gaussian_kl", tensors, {**word, "reduction": _REDUCTIONS[i]}, "standard")
        yield Sample("sample_gaussian", tensors, {**word, "seed": 9}, "standard")
        for k, (shape, small) in enumerate(_BROADCASTS):
            reduction = _REDUCTIONS[(2 * i + k) % 5]
            options: dict[str, Any] = {**word, "reduction": reduction}
            tensors = {"mu": Make("real", shape), "logvar": _spread(parameterization, shape)}
            if k % 3 != 1:
                tensors["prior_mu"] = Make("real", small)
            else:
                options["prior_mu"] = 0.25
            if k % 3 != 2:
                tensors["prior_logvar"] = _spread(parameterization, shape if k == 3 else small)
            else:
                options["prior_logvar"] = 0.5
            if len(shape) > 2 and k % 2 == 0:
                options["batch_dims"] = 2
            if (i + k) % 4 == 3 and reduction not in ("none", "sample"):
                options["free_bits"] = 0.75
            yield Sample("gaussian_kl", tensors, options, f"{list(shape)}_{list(small)}")
            if (i + k) % 2:
                draw = {"num_samples": 2} if k % 3 else {}
                yield Sample(
                    "sample_gaussian", tensors, {"seed": k, **draw, **options}, f"{list(shape)}_{list(small)}"
                )


def _log_prob_samples() -> Iterable[Sample]:
    for i, parameterization in enumerate(_PARAMETERIZATIONS):
        word = {"parameterization": parameterization}
        shapes = (((5,), (5,)), *_BROADCASTS, ((3, 4), (3, 4)), ((2, 3, 1, 2), (2, 3, 1, 2)))
        for k, (shape, small) in enumerate(shapes):
            options: dict[str, Any] = {**word, "reduction": _REDUCTIONS[(i + k) % 5]}
            tensors = {"z": Make("real", shape)}
            if k % 4 != 3:
                tensors["mu"] = Make("real", small)
            elif i != 1:
                options["mu"] = -0.5
            if k % 4 != 1:
                tensors["logvar"] = _spread(parameterization, small if k % 2 else shape)
            elif i != 2:
                options["logvar"] = 0.75
            if len(shape) > 2 and k % 2 == 1:
                options["batch_dims"] = 2
            yield Sample("gaussian_log_prob", tensors, options, f"{list(shape)}_{list(small)}")


def _broadcast_bernoulli_samples() -> Iterable[Sample]:
    for k, (shape, small) in enumerate(_BROADCASTS):
        options: dict[str, Any] = {"reduction": _REDUCTIONS[(k + 1) % 5]}
        if len(shape) > 2 and k % 2 == 0:
            options["batch_dims"] = 2
        tensors = {"logits": Make("logits", shape), "prior_logits": Make("logits", small)}
        yield Sample("bernoulli_kl", tensors, options, f"{list(shape)}_{list(small)}")


# Logits, prior (None: uniform), the dimension of the outcomes and how many index samples.
_OUTCOMES: tuple[tuple[tuple[int, ...], tuple[int, ...] | None, int, int], ...] = (
    ((3, 4), None, 1, 1),
    ((3, 4), (3, 4), -1, 1),
    ((3, 4), (4,), 1, 1),
    ((2, 3, 4), (3, 1), 1, 1),
    ((2, 3, 4), None, 2, 2),
    ((2, 5, 2, 2), (2, 5, 2, 2), 1, 1),
    ((2, 2, 3, 2), (1, 3, 1), 2, 1),
    ((2, 1, 3, 2, 2), (2, 1, 3, 2, 2), -3, 2),
    ((2, 1, 2, 2, 3, 2), (1, 1, 3, 1), 4, 2),
    ((2, 1, 2, 2, 3, 2), None, 2, 1),
)


def _categorical_samples() -> Iterable[Sample]:
    for i, (shape, prior, dim, batch_dims) in enumerate(_OUTCOMES):
        for reduction in (_REDUCTIONS[i % 5], _REDUCTIONS[(i + 2) % 5]):
            tensors = {"logits": Make("logits", shape)}
            if prior is not None:
                tensors["prior_logits"] = Make("logits", prior)
            options = {"dim": dim, "batch_dims": batch_dims, "reduction": reduction}
            yield Sample("categorical_kl", tensors, options, f"{list(shape)}_{prior and list(prior)}")


# --- the table: reconstructions -------------------------------------------------------------------

_IMAGE_SHAPES = ((2, 3, 5), (2, 2, 2, 3), (2, 3, 1, 2, 2), (3, 1, 4))
# How a mask is given: (parameter, kind, channels or 1).
_MASKS = (
    ("mask_logits", "logits", False),
    ("mask", "unit", True),
    ("mask", "bool", False),
    ("mask_logits", "logits", True),
    ("mask", "uint8", True),
    ("mask", "unit", False),
    ("mask", "bool", True),
    ("mask", "uint8", False),
)
_LOGIT_MASKS = (_MASKS[0], _MASKS[3])


def _scale(how: int, channels: int) -> Make | float:
    """A float, or a tensor of shape [], [1] or [C]."""
    return (0.7, Make("positive", ()), Make("positive", (channels,)), Make("positive", (1,)))[how % 4]


def _image(shape: tuple[int, ...], mask: tuple[str, str, bool], bg: bool = True) -> dict[str, Make]:
    name, kind, per_channel = mask
    images = {"fg": Make("real", shape), "bg": Make("real", shape), "target": Make("unit", shape)}
    if not bg:
        del images["bg"]
    return {**images, name: Make(kind, shape if per_channel else (shape[0], 1, *shape[2:]))}


def _likelihood(name: str, turn: int, channels: int, *scales: str) -> tuple[dict, dict]:
    """The likelihood and the scales it takes: (tensors, options)."""
    tensors: dict[str, Make] = {}
    options: dict[str, Any] = {"likelihood": name}
    if name in reference.SCALED_LIKELIHOODS:
        for k, scale_name in enumerate(scales):
            value = _scale(turn + k, channels)
            (tensors if isinstance(value, Make) else options)[scale_name] = value
    return tensors, options


_COMPOSITIONS = {
    "masked": ("masked_reconstruction_loss", {}, _MASKS, ("fg_scale", "bg_scale")),
    "blended": ("blended_reconstruction_loss", {}, _MASKS, ("scale",)),
    "joint": (
        "mixture_reconstruction_loss", {"channels": "joint"}, _LOGIT_MASKS[:1], ("fg_scale", "bg_scale"),
    ),
    "independent": (
        "mixture_reconstruction_loss", {"channels": "independent"}, _LOGIT_MASKS, ("fg_scale", "bg_scale"),
    ),
}  # fmt: skip


def _reconstruction_samples() -> Iterable[Sample]:
    """Every likelihood with every composition, twice; masks, scales, reductions and shapes in turn."""
    pairs = itertools.product(range(2), enumerate(reference.LIKELIHOODS), enumerate(_COMPOSITIONS))
    for turn, (repeat, (i, likelihood), (j, composition)) in enumerate(pairs):
        op, fixed, masks, scales = _COMPOSITIONS[composition]
        shape = _IMAGE_SHAPES[(i + j + repeat) % len(_IMAGE_SHAPES)]
        mask = masks[(i + repeat * 4 + (repeat if len(masks) == 2 else 0)) % len(masks)]
        more, options = _likelihood(likelihood, turn // 4 + repeat, shape[1], *scales)
        options = {**fixed, **options, "reduction": _REDUCTIONS[(i + 2 * j + 3 * repeat) % 5]}
        if composition == "masked" and repeat == 1:
            options |= {"fg_weight": 2.0, "bg_weight": 0.25}
        tensors = {**_image(shape, mask), **more}
        yield Sample(op, tensors, options, f"{_describe(mask)}_{len(shape) - 2}d")


def _region_samples() -> Iterable[Sample]:
    """What only the masked loss has: area normalisation, terms, a single reconstruction."""
    op, names = "masked_reconstruction_loss", list(reference.LIKELIHOODS)
    for i, mask in enumerate(_MASKS):
        shape = _IMAGE_SHAPES[i % 3]
        more, options = _likelihood(names[i % len(names)], i + 1, shape[1], "fg_scale", "bg_scale")
        single = i % 3 == 2
        options |= {"normalize": "area", "reduction": _REDUCTIONS[i % 5]}
        options |= {"return_terms": i % 2 == 0, "fg_weight": 0.5}
        options |= {"bg": None} if single else {}
        yield Sample(op, {**_image(shape, mask, not single), **more}, options, _describe(mask))
    for i, kind in enumerate(("empty_region", "bool_empty_region", "empty_region")):
        options = {"normalize": "area", "reduction": ("batchmean", "sample", "none")[i]}
        tensors = _image((3, 2, 2, 2), ("mask", kind, i == 2))
        yield Sample(op, tensors, {**options, "return_terms": i < 2}, kind, smooth=False)
    for i, reduction in enumerate(_REDUCTIONS):
        mask = _MASKS[2 * i % 8]
        options = {"reduction": reduction, "return_terms": True, "likelihood": names[i % len(names)]}
        options |= {"bg": None} if i % 2 else {}
        tensors = _image(_IMAGE_SHAPES[1], mask, not i % 2)
        yield Sample(op, tensors, options, f"terms_{_describe(mask)}")


_PLAIN_SHAPES = ((3,), (2, 5), (2, 3, 4), (2, 2, 2, 3), (2, 2, 1, 2, 3), (2, 2, 1, 2, 1, 3))


def _plain_samples() -> Iterable[Sample]:
    """A loss without layers: any number of dimensions, weights and maps in turn."""
    for i, (name, repeat) in enumerate(itertools.product(reference.LIKELIHOODS, range(2))):
        shape = _PLAIN_SHAPES[i % len(_PLAIN_SHAPES)]
        channels = shape[1] if len(shape) > 1 else 1
        more, options = _likelihood(name, i, channels, "scale")
        if more and i % 4 == 3:
            more = {"scale": Make("positive", (1, *shape[1:]))}
        tensors = {"prediction": Make("real", shape), "target": Make("unit", shape), **more}
        if i % 3 == 1:
            tensors["weight"] = Make(("weight", "bool")[i % 2], shape)
        options["reduction"] = _REDUCTIONS[(i + repeat) % 5]
        if i % 5 == 4 and len(shape) > 2:
            options["batch_dims"] = 2
        yield Sample(
            "reconstruction_loss", tensors, options, f"rank{len(shape)}{'_weight' if i % 3 == 1 else ''}"
        )


# What weights and maps of scales are like: shapes that broadcast to an image.
_SPREADS: tuple[Callable[[tuple[int, ...]], tuple[int, ...]], ...] = (
    lambda s: (s[0], 1, *s[2:]),
    lambda s: s,
    lambda s: (1, 1, *s[2:]),
    lambda s: s[2:],
    lambda s: (s[0], *(1,) * (len(s) - 1)),
    lambda s: (1, *s[1:]),
)


def _weight_samples() -> Iterable[Sample]:
    """Weights and maps of scales with each composition, of each shape; sometimes with several dimensions of
    samples."""
    for i, (composition, kind) in enumerate(
        itertools.product(_COMPOSITIONS, ("weight", "bool", "map", "uint8", "both", "map"))
    ):
        op, fixed, masks, scales = _COMPOSITIONS[composition]
        batch_dims = 2 if i % 5 == 4 else 1
        shape = ((2, 2, 2, 3), (2, 3, 4), (3, 2, 1, 2, 2))[i % 3]
        mask = masks[i % len(masks)]
        tensors = _image(shape, mask)
        if composition == "masked" and i % 4 == 3:
            del tensors["bg"]
            fixed = {**fixed, "bg": None}
        options = {**fixed, "likelihood": ("gaussian", "laplace", "charbonnier")[i % 3]}
        options |= {"reduction": _REDUCTIONS[i % 5]}
        if kind in ("weight", "bool", "uint8", "both"):
            spread = _SPREADS[i % len(_SPREADS)](shape)
            if composition == "joint" and len(spread) == len(shape):
                spread = (spread[0], 1, *spread[2:])
            tensors["weight"] = Make("holes" if kind == "both" else kind, spread)
        if kind in ("map", "both"):
            tensors[scales[i % len(scales)]] = Make("positive", _SPREADS[(i + i // 6) % len(_SPREADS)](shape))
        if composition == "masked" and i % 2:
            options |= {"normalize": "area"}
        if composition == "masked" and i % 3 == 0:
            options |= {"return_terms": True, "bg_weight": 0.5}
        if batch_dims == 2:
            tensors = {
                n: Make(m.kind, (2, *m.shape) if len(m.shape) == len(shape) else m.shape)
                for n, m in tensors.items()
            }
            options["batch_dims"] = 2
        note = f"{kind}_{_describe(mask)}_{len(shape) - 2}d"
        yield Sample(op, tensors, options, note, smooth=kind != "both")


# --- the table: slots -----------------------------------------------------------------------------

_SLOT_SHAPES = ((2, 3, 2, 5), (3, 1, 3, 2, 2), (2, 5, 3, 3, 2), (2, 2, 1, 2, 1, 3), (1, 9, 2, 4))
_SLOT_OPS = (
    ("slot_mixture_loss", {"channels": "joint"}),
    ("slot_mixture_loss", {"channels": "independent"}),
    ("slot_blended_loss", {}),
)


def _slot_samples() -> Iterable[Sample]:
    """Every likelihood with every composition; masks, scales, weights, reductions and shapes in turn."""
    for i, (likelihood, (j, (op, fixed))) in enumerate(
        itertools.product(reference.LIKELIHOODS, enumerate(_SLOT_OPS))
    ):
        repeat = i // 3
        shape = _SLOT_SHAPES[(repeat + j) % len(_SLOT_SHAPES)]
        per_channel = j > 0 and repeat % 2 == 1
        kind = ("logits", "log_mask")[(repeat + j) % 2]
        yield _slot_sample(op, fixed, shape, likelihood, kind, per_channel, i)
    for i, (kind, (j, (op, fixed))) in enumerate(
        itertools.product(
            ("map", "weight", "bool", "holes", "map and weight", "two dimensions of samples"),
            enumerate(_SLOT_OPS),
        )
    ):
        shape = _SLOT_SHAPES[(i + j) % len(_SLOT_SHAPES)]
        sample = _slot_sample(
            op, fixed, shape, ("gaussian", "laplace")[i % 2], ("logits", "log_mask")[i % 2], False, i + 1
        )
        tensors, options, image = dict(sample.tensors), dict(sample.options), (shape[0], *shape[2:])
        tensors.pop("scale", None)
        options.pop("scale", None)
        if "map" in kind:
            full = image if j == 2 else shape
            sizes = (full, (1, *full[1:]), (full[0], *(1,) * (len(full) - 1)), full[2:])[i % 4]
            tensors["scale"] = Make("positive", sizes)
        if kind in ("weight", "bool", "holes", "map and weight"):
            sizes = ((shape[0], 1, *shape[3:]), (1, 1, *shape[3:]), image)[i % 3 if j else i % 2]
            tensors["weight"] = Make("weight" if "map" in kind else kind, sizes)
        if kind == "two dimensions of samples":
            tensors = {n: Make(m.kind, (2, *m.shape)) for n, m in tensors.items()}
            options["batch_dims"] = 2
        yield Sample(op, tensors, options, f"{kind}_{sample.note}", smooth=kind != "holes")


def _slot_sample(
    op: str, fixed: dict, shape: tuple[int, ...], likelihood: str, kind: str, per_channel: bool, turn: int
) -> Sample:
    more, options = _likelihood(
        likelihood, turn, shape[2] if op == "slot_blended_loss" else shape[1], "scale"
    )
    mask_shape = shape if per_channel else (*shape[:2], 1, *shape[3:])
    tensors = {
        "slots": Make("real", shape),
        "target": Make("unit", (shape[0], *shape[2:])),
        ("mask_logits" if kind == "logits" else kind): Make(kind, mask_shape),
        **more,
    }
    options = {**fixed, **options, "reduction": _REDUCTIONS[turn % 5]}
    if op == "slot_mixture_loss" and turn % 2:
        options["return_responsibilities"] = True
    note = f"{kind}_{'C' if per_channel else '1'}_{shape[1]}slots_{len(shape) - 3}d"
    return Sample(op, tensors, options, note)


def _describe(mask: tuple[str, str, bool]) -> str:
    name, kind, per_channel = mask
    return f"{name if name == 'mask_logits' else kind}_{'C' if per_channel else '1'}"


SAMPLES: list[Sample] = [
    *_reparameterize_samples(),
    *_gaussian_kl_samples(),
    *_sample_gaussian_samples(),
    *_parameterized_samples(),
    *_log_prob_samples(),
    *_bernoulli_kl_samples(),
    *_broadcast_bernoulli_samples(),
    *_categorical_samples(),
    *_reconstruction_samples(),
    *_region_samples(),
    *_plain_samples(),
    *_weight_samples(),
    *_slot_samples(),
]


def covering(samples: Sequence[Sample]) -> list[Sample]:
    """A few samples that together have every feature of all: for checks too slow for every row."""
    missing = set().union(*(s.features for s in samples))
    chosen = []
    while missing:
        best = max(samples, key=lambda s: len(s.features & missing))
        chosen.append(best)
        missing -= best.features
    return chosen


def first_of_each_op() -> list[Sample]:
    """One sample per op and composition."""
    groups = {(s.op, s.options.get("channels")): s for s in reversed(SAMPLES)}
    return list(groups.values())


def each(samples: Sequence[Sample] = SAMPLES) -> pytest.MarkDecorator:
    """Runs a test once per sample."""
    return pytest.mark.parametrize("sample", samples, ids=lambda s: s.id)
