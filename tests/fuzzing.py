"""Random calls of the public functions, and what must hold of each: the differential fuzzer.

A :class:`Case` is plain data, printed when it fails; ``check(case)`` runs it again.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import samples
import torch
from compare import OPERATIONS
from hypothesis import strategies as st
from torch import Tensor

import fgbg_cuda
from fgbg_cuda import reference
from fgbg_cuda.functional import _routes

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REDUCTIONS = ("batchmean", "none", "sample", "sum", "mean")

# What the cases of a run did, so that a run that tests nothing cannot pass.
COUNTS: Counter[str] = Counter()


# --- a case ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operand:
    """A tensor to be made."""

    shape: tuple[int, ...]
    kind: str
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    grad: bool = False
    special: tuple[float, ...] = ()  # written over random elements


@dataclass(frozen=True)
class Case:
    """A call: operands and other arguments by name. The numbers depend on `seed` alone."""

    op: str
    operands: dict[str, Operand]
    options: dict[str, Any]
    seed: int = 0
    threads: int = 1
    upstream: str = "contiguous"  # layout of the gradients that arrive at unreduced results

    @property
    def wild(self) -> bool:
        return any(o.special for o in self.operands.values())

    @property
    def grad(self) -> bool:
        return any(o.grad for o in self.operands.values())


_KINDS = {
    "real": lambda shape, g: _normal(shape, g),
    "wide": lambda shape, g: 20 * _normal(shape, g),
    "tiny": lambda shape, g: 1e-3 * _normal(shape, g),
    "unit": lambda shape, g: torch.rand(shape, dtype=torch.float64, generator=g),
    "binary": lambda shape, g: torch.randint(2, shape, generator=g).double(),
    "positive": lambda shape, g: 0.3 + 2 * torch.rand(shape, dtype=torch.float64, generator=g),
    "zero": lambda shape, g: torch.zeros(shape, dtype=torch.float64),
    "one": lambda shape, g: torch.ones(shape, dtype=torch.float64),
    "constant": lambda shape, g: torch.full(shape, 0.7, dtype=torch.float64),
    # The same numbers for every operand of this kind: a prediction that is the target, and so on.
    "shared": lambda shape, g: _normal(shape, torch.Generator().manual_seed(1)),
}


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def make(case: Case, name: str, device: torch.device) -> Tensor:
    """The operand of that name: a leaf, in its layout."""
    operand = case.operands[name]
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ case.seed)
    values = _KINDS[operand.kind](operand.shape, generator)
    if values.numel():
        for special in operand.special:
            for _ in range(1 + values.numel() // 50):
                values.view(-1)[int(torch.randint(values.numel(), (), generator=generator))] = special
    if operand.dtype.is_floating_point:
        values = values.to(operand.dtype)
    else:
        # uint8 masks are read as such: any number that is not 0 is foreground.
        values = values.nan_to_num().gt(0.5).to(operand.dtype)
        values = values if operand.dtype == torch.bool else 3 * values
    values = in_layout(values.to(device), operand.layout, generator)
    return values.requires_grad_(operand.grad)


LAYOUTS = (
    "contiguous",
    "channels_last",
    "permuted",
    "strided",
    "padded",
    "misaligned",
    "expanded",
    "negated",
)


def in_layout(values: Tensor, layout: str, generator: torch.Generator) -> Tensor:
    """The same numbers (but for "expanded") in another memory layout; gaps hold a number that shows."""
    shape = list(values.shape)
    filler = 77
    if layout == "channels_last" and values.dim() in (4, 5):
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return values.contiguous(memory_format=formats[values.dim()])
    if layout in ("permuted", "channels_last"):
        order = torch.randperm(values.dim(), generator=generator).tolist()
        back = sorted(range(values.dim()), key=order.__getitem__)
        return values.permute(order).contiguous().permute(back)
    if layout == "strided" and values.dim():
        base = values.new_full((*shape[:-1], 2 * shape[-1] + 1), filler)
        base[..., 1::2] = values
        return base[..., 1::2]
    if layout == "padded" and values.dim():
        base = values.new_full((*shape[:-1], shape[-1] + 3), filler)
        base[..., 2 : 2 + shape[-1]] = values
        return base[..., 2 : 2 + shape[-1]]
    if layout == "misaligned":
        base = values.new_full((values.numel() + 1,), filler)
        base[1:] = values.flatten()
        return base[1:].view(shape)
    if layout == "expanded" and values.numel() and values.dim():
        dim = int(torch.randint(values.dim(), (), generator=generator))
        return values.narrow(dim, 0, 1).expand(shape)
    if layout == "negated" and values.dtype in (torch.float32, torch.float64):
        # A lazily negated view, whose memory holds the numbers with the other sign.
        return torch.complex(torch.zeros_like(values), -values).conj().imag
    return values.contiguous()


# --- strategies -----------------------------------------------------------------------------------

# Around vector widths, blocks and segments of both devices' kernels.
_SMALL = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17)
_LARGE = (31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513)
_HUGE = (1023, 1025, 2047, 4095, 4096, 4097, 8191, 8193)
_SPECIAL = (
    0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -1e-40, 1e-30, 1.0, -1.0, 30.0, -30.0, 88.0, -88.0,
    89.5, 100.0, -100.0, -104.0, 1e4, -1e4, 65504.0, -7e4, 1e15, -1e15,
)  # fmt: skip
# Of these, the reciprocal has no overflow of its own.
_SPECIAL_SCALES = (0.0, 0.01, 100.0, 1e4, -1.0, math.inf, math.nan)


def _one_in(draw: Any, n: int) -> bool:
    return draw(st.integers(0, n - 1)) == n - 1


def _sizes(draw: Any, rank: int, budget: int) -> list[int]:
    """`rank` sizes with a product of at most `budget`."""
    sizes = []
    for k in range(rank):
        pool = _SMALL if draw(st.booleans()) else _LARGE + _HUGE
        allowed = [n for n in pool if n <= budget] or [1]
        n = draw(st.sampled_from(allowed))
        budget //= n
        sizes.insert(draw(st.integers(0, k)), n)
    return sizes


def _shape(draw: Any, least: int, most: int, image: bool) -> tuple[int, ...]:
    """[B, *sizes] or [B, C, *sizes] with `least` to `most` sizes, sometimes of no elements, sometimes
    large enough for a second thread."""
    budget = 70_000 if _one_in(draw, 16) else 5_000 if _one_in(draw, 4) else 700
    batch = draw(st.sampled_from((1, 2, 3, 5, 4)))
    channels = [draw(st.sampled_from((1, 3, 2, 4)))] if image else []
    sizes = _sizes(draw, draw(st.integers(least, most)), max(1, budget // (batch * math.prod(channels))))
    shape = [batch, *channels, *sizes]
    if _one_in(draw, 24):
        empty = draw(st.integers(0, len(shape) - 1))
        shape[empty] = 0 if not (image and empty == 1) else 1  # no channels: refused
    return tuple(shape)


class _Tensors:
    """Draws operands that share a style: one type or several, tame or with special values."""

    def __init__(self, draw: Any):
        self.draw = draw
        self.dtypes = [draw(st.sampled_from(FLOATS))]
        if _one_in(draw, 4):
            self.dtypes = list(FLOATS)
        self.layouts = LAYOUTS if draw(st.booleans()) else LAYOUTS[:1]
        self.wild = _one_in(draw, 4)
        self.grads = draw(st.sampled_from(("all", "all", "some", "some", "none")))

    def __call__(
        self,
        shape: tuple[int, ...],
        *kinds: str,
        dtypes: Sequence[torch.dtype] = (),
        special: Sequence[float] = _SPECIAL,
    ) -> Operand:
        draw = self.draw
        dtype = draw(st.sampled_from(dtypes or self.dtypes))
        special = st.lists(st.sampled_from(special), min_size=1, max_size=3)
        special = tuple(draw(special)) if self.wild and draw(st.booleans()) else ()
        grad = self.grads == "all" or (self.grads == "some" and draw(st.booleans()))
        return Operand(
            shape,
            draw(st.sampled_from(kinds)),
            dtype,
            draw(st.sampled_from(self.layouts)),
            grad and dtype.is_floating_point,
            special,
        )


_REAL = ("real", "real", "wide", "tiny", "zero", "constant", "shared")


def _optional(draw: Any, options: dict[str, Any], name: str, values: st.SearchStrategy) -> None:
    if draw(st.booleans()):
        options[name] = draw(values)


def _draws(draw: Any, tensors: _Tensors, operands: dict, options: dict) -> None:
    """seed, offset, num_samples."""
    options["seed"] = draw(st.integers(-(2**63), 2**63 - 1))
    _optional(draw, options, "offset", st.sampled_from((1, 2, 3, 5, 4096, 2**32 - 1, 2**62 + 1, 2**63 - 1)))
    _optional(draw, options, "num_samples", st.sampled_from((1, 2, 3)))


def _reduction(draw: Any, options: dict, most_batch_dims: int) -> None:
    _optional(draw, options, "reduction", st.sampled_from(REDUCTIONS))
    if most_batch_dims > 1 and _one_in(draw, 3):
        options["batch_dims"] = draw(st.integers(1, most_batch_dims))


def _kl(draw: Any, options: dict, most_batch_dims: int) -> None:
    _reduction(draw, options, most_batch_dims)
    if options.get("reduction") not in ("none", "sample"):
        _optional(draw, options, "free_bits", st.sampled_from((0.0, 0.01, 0.5, 2.0)))


def _smaller(draw: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """One that broadcasts to it; often itself."""
    if draw(st.booleans()):
        return shape
    kept = shape[draw(st.integers(0, len(shape))) :]
    return tuple(1 if draw(st.booleans()) else n for n in kept)


def _broadcast(
    draw: Any,
    tensors: _Tensors,
    name: str,
    shape: tuple[int, ...],
    numbers: tuple,
    kinds: tuple,
    operands: dict,
    options: dict,
) -> None:
    """A tensor, a number, or nothing."""
    how = draw(st.sampled_from(("tensor", "tensor", "number", "default")))
    if how == "tensor":
        operands[name] = tensors(_smaller(draw, shape), *kinds)
    elif how == "number":
        options[name] = draw(st.sampled_from(numbers))


def _parameterization(draw: Any, options: dict) -> tuple:
    """Drawn; returned are the kinds that a spread may be of, and numbers."""
    _optional(draw, options, "parameterization", st.sampled_from(("std", "log_std", "logvar")))
    if options.get("parameterization") == "std":
        return ("positive", "positive", "positive", "unit", "zero", "real"), (0.5, 1, 3.0, 0.01)
    return _REAL, (0.0, 0, -1.5, 0.25, 30.0)


_NUMBERS_OF_MEANS = (0.0, 0, -1.5, 0.25, 100.0)


def _latent_case(draw: Any, op: str, tensors: _Tensors) -> tuple[dict, dict]:
    shape = _shape(draw, 0, 5, image=False)
    options: dict[str, Any] = {}
    spreads, numbers = _parameterization(draw, options)
    operands = {"mu": tensors(shape, *_REAL), "logvar": tensors(shape, *spreads)}
    if op != "reparameterize":
        _broadcast(draw, tensors, "prior_mu", shape, _NUMBERS_OF_MEANS, _REAL, operands, options)
        _broadcast(draw, tensors, "prior_logvar", shape, numbers, spreads, operands, options)
        _kl(draw, options, len(shape))
    if op != "gaussian_kl":
        _draws(draw, tensors, operands, options)
    return operands, options


def _log_prob_case(draw: Any, op: str, tensors: _Tensors) -> tuple[dict, dict]:
    shape = _shape(draw, 0, 5, image=False)
    options: dict[str, Any] = {}
    spreads, numbers = _parameterization(draw, options)
    operands = {"z": tensors(shape, *_REAL)}
    _broadcast(draw, tensors, "mu", shape, _NUMBERS_OF_MEANS, _REAL, operands, options)
    _broadcast(draw, tensors, "logvar", shape, numbers, spreads, operands, options)
    _reduction(draw, options, len(shape))
    return operands, options


def _bernoulli_case(draw: Any, op: str, tensors: _Tensors) -> tuple[dict, dict]:
    shape = _shape(draw, 0, 5, image=False)
    operands = {"logits": tensors(shape, *_REAL)}
    options: dict[str, Any] = {}
    _broadcast(draw, tensors, "prior_logits", shape, (0.0, 0, -1.5, 30.0, 1e4), _REAL, operands, options)
    _reduction(draw, options, len(shape))
    return operands, options


def _categorical_case(draw: Any, op: str, tensors: _Tensors) -> tuple[dict, dict]:
    shape = tuple(max(n, 1) for n in _shape(draw, 1, 5, image=False))
    operands = {"logits": tensors(shape, *_REAL)}
    options: dict[str, Any] = {}
    _broadcast(draw, tensors, "prior_logits", shape, (0.0, 3), _REAL, operands, options)
    dim = draw(st.integers(1, len(shape) - 1))
    if dim != 1 or draw(st.booleans()):
        options["dim"] = dim - len(shape) if draw(st.booleans()) else dim
    _reduction(draw, options, dim)
    return operands, options


def _broadcast_shape(draw: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape of two dimensions at least, where there are so many, that broadcasts to this one."""
    shape = tuple(n if draw(st.booleans()) else 1 for n in shape)
    return shape[draw(st.integers(0, max(0, len(shape) - 2))) :]


def _scale(
    draw: Any, tensors: _Tensors, name: str, shape: tuple[int, ...], channel: int, case: tuple[dict, dict]
) -> None:
    operands, options = case
    how = draw(st.sampled_from(("default", "number", "0d", "one", "channels", "map", "map")))
    if how == "number":
        options[name] = draw(st.sampled_from((0.5, 1, 2.0, 0.01, 100.0)))
    elif how != "default":
        channels = shape[channel] if channel < len(shape) else 1
        size = {"0d": (), "one": (1,), "channels": (channels,)}.get(how) or _broadcast_shape(draw, shape)
        size = () if how == "0d" else size
        operands[name] = tensors(size, "positive", special=_SPECIAL_SCALES)


def _weight(draw: Any, tensors: _Tensors, shape: tuple[int, ...], *kinds: str) -> Operand:
    dtypes = (torch.bool, torch.uint8) if _one_in(draw, 3) else ()
    return tensors(_broadcast_shape(draw, shape), *kinds, dtypes=dtypes)


def _target(tensors: _Tensors, shape: tuple[int, ...], likelihood: str) -> Operand:
    if likelihood == "poisson":  # counts; of less than nothing the formula has no meaning
        return tensors(shape, "unit", "binary", "positive", special=(0.0, 1.0, 30.0, 1e4, math.inf, math.nan))
    return tensors(shape, "unit", "unit", "binary", *_REAL)


def _plain_case(draw: Any, op: str, tensors: _Tensors) -> tuple[dict, dict]:
    shape = _shape(draw, 0, 5, image=False)
    likelihood = draw(st.sampled_from(tuple(reference.LIKELIHOODS)))
    options: dict[str, Any] = {"likelihood": likelihood}
    operands = {"prediction": tensors(shape, *_REAL), "target": _target(tensors, shape, likelihood)}
    if len(shape) > 1:
        _optional(draw, options, "batch_dims", st.integers(1, min(len(shape), 3)))
    if likelihood in reference.SCALED_LIKELIHOODS:
        _scale(draw, tensors, "scale", shape, options.get("batch_dims", 1), (operands, options))
    if draw(st.booleans()):
        operands["weight"] = _weight(draw, tensors, shape, "unit", "binary", *_REAL)
    _optional(draw, options, "reduction", st.sampled_from(REDUCTIONS))
    return operands, options


def _reconstruction_case(draw: Any, op: str, tensors: _Tensors) -> tuple[dict, dict]:
    masked, mixture = op == "masked_reconstruction_loss", op == "mixture_reconstruction_loss"
    shape = _shape(draw, 1, 3, image=True)
    likelihood = draw(st.sampled_from(tuple(reference.LIKELIHOODS)))
    options: dict[str, Any] = {"likelihood": likelihood}
    channel = 1
    if _one_in(draw, 6):
        shape = (draw(st.sampled_from((1, 2, 3))), *shape)
        options["batch_dims"] = channel = 2
    operands = {"fg": tensors(shape, *_REAL)}
    if masked and _one_in(draw, 4):
        options["bg"] = None
    else:
        operands["bg"] = tensors(shape, *_REAL)
    operands["target"] = _target(tensors, shape, likelihood)
    if mixture:
        _optional(draw, options, "channels", st.sampled_from(("joint", "independent")))
    per_channel = options.get("channels", "joint" if mixture else "") != "joint" and draw(st.booleans())
    one = (*shape[:channel], 1, *shape[channel + 1 :])
    mask_shape = shape if per_channel else one
    if mixture or draw(st.booleans()):
        operands["mask_logits"] = tensors(mask_shape, *_REAL)
    else:
        integer = _one_in(draw, 3)
        dtypes = (torch.bool, torch.uint8) if integer else ()
        kinds = ("unit", "unit", "binary", "zero", "one", "constant")
        operands["mask"] = tensors(mask_shape, *kinds, dtypes=dtypes)
    if likelihood in reference.SCALED_LIKELIHOODS:
        for name in ("scale",) if op == "blended_reconstruction_loss" else ("fg_scale", "bg_scale"):
            _scale(draw, tensors, name, shape, channel, (operands, options))
    if masked:
        for name in ("fg_weight", "bg_weight"):
            _optional(draw, options, name, st.sampled_from((0.0, 2.0, 0.25, -1, 10.0)))
        _optional(draw, options, "normalize", st.sampled_from(("area", "area", None)))
        _optional(draw, options, "return_terms", st.booleans())
    if _one_in(draw, 3):
        joint = mixture and options.get("channels", "joint") == "joint"
        kinds = ("unit", "binary") if options.get("normalize") else ("unit", "binary", *_REAL)
        operands["weight"] = _weight(draw, tensors, one if joint else shape, *kinds)
    _optional(draw, options, "reduction", st.sampled_from(REDUCTIONS))
    return operands, options


def _slot_case(draw: Any, op: str, tensors: _Tensors) -> tuple[dict, dict]:
    tensors.wild = False  # but for masks of -inf
    image = _shape(draw, 1, 3, image=True)
    mixture, slots = op == "slot_mixture_loss", draw(st.sampled_from((1, 2, 3, 4, 7, 9, 33)))
    image = image if math.prod(image) < 800 else (1, image[1], *(min(n, 5) for n in image[2:]))
    options: dict[str, Any] = {"likelihood": draw(st.sampled_from(tuple(reference.LIKELIHOODS)))}
    lead = image[:1]
    if _one_in(draw, 6):
        lead = (draw(st.sampled_from((1, 2, 3))), *lead)
        options["batch_dims"] = 2
    shape, image = (*lead, slots, *image[1:]), (*lead, *image[1:])
    one = (*lead, 1, *image[len(lead) + 1 :])
    if mixture:
        _optional(draw, options, "channels", st.sampled_from(("joint", "independent")))
        _optional(draw, options, "return_responsibilities", st.booleans())
    joint = mixture and options.get("channels", "joint") == "joint"
    operands = {"slots": tensors(shape, *_REAL), "target": _target(tensors, image, options["likelihood"])}
    mask_shape = shape if not joint and draw(st.booleans()) else (*lead, slots, *one[len(lead) :])
    name = draw(st.sampled_from(("mask_logits", "log_mask")))
    operands[name] = tensors(mask_shape, "real", "tiny", "zero", "constant", "wide")
    if slots > 2 and _one_in(draw, 3):
        operands[name] = dataclasses.replace(operands[name], special=(-math.inf,))
    if options["likelihood"] in reference.SCALED_LIKELIHOODS:
        of = shape if mixture else image
        _scale(draw, tensors, "scale", of, len(lead), (operands, options))
    if _one_in(draw, 3):
        operands["weight"] = _weight(draw, tensors, one if joint else image, "unit", "binary", *_REAL)
    _optional(draw, options, "reduction", st.sampled_from(REDUCTIONS))
    return operands, options


def _bound_case(draw: Any, op: str, tensors: _Tensors) -> tuple[dict, dict]:
    shape = tuple(max(n, 1) for n in _shape(draw, 0, 2, image=False))
    operands = {name: tensors(shape, *_REAL) for name in ("log_p", "log_q")}
    options: dict[str, Any] = {}
    _optional(draw, options, "dim", st.integers(-len(shape), len(shape) - 1))
    _optional(draw, options, "bits_per_dim", st.sampled_from((1, 100)))
    return operands, options


def _noise_case(draw: Any, op: str, tensors: _Tensors) -> tuple[dict, dict]:
    options: dict[str, Any] = {"size": list(_shape(draw, 0, 3, image=False))}
    _draws(draw, tensors, {}, options)
    options.pop("num_samples", None)
    _optional(draw, options, "dtype", st.sampled_from(FLOATS))
    return {}, options


_CASES = {
    "reparameterize": _latent_case,
    "gaussian_kl": _latent_case,
    "sample_gaussian": _latent_case,
    "gaussian_log_prob": _log_prob_case,
    "bernoulli_kl": _bernoulli_case,
    "reconstruction_loss": _plain_case,
    "categorical_kl": _categorical_case,
    "masked_reconstruction_loss": _reconstruction_case,
    "blended_reconstruction_loss": _reconstruction_case,
    "mixture_reconstruction_loss": _reconstruction_case,
    "slot_mixture_loss": _slot_case,
    "slot_blended_loss": _slot_case,
    "philox_normal": _noise_case,
    "importance_weighted_bound": _bound_case,
}
# The losses have by far the most combinations.
OPS = (*_CASES, *[op for op in _CASES if op.endswith("reconstruction_loss")] * 2)


@st.composite
def cases(draw: Any) -> Case:
    """Valid calls."""
    op = draw(st.sampled_from(OPS))
    operands, options = _CASES[op](draw, op, _Tensors(draw))
    return Case(
        op,
        operands,
        options,
        seed=draw(st.integers(0, 2**31 - 1)),
        threads=draw(st.sampled_from((1, 2, 4))),
        upstream=draw(st.sampled_from(LAYOUTS)),
    )


# --- the specification ----------------------------------------------------------------------------


# Not looked up when called: _specified puts the kernel's noise in its place.
_exact_noise = reference.philox_normal


def _philox(seed: int, size: Sequence[int], offset: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return _exact_noise(torch.tensor([seed]), size, offset, torch.float64)  # not rounded to dtype


def _bound(log_p: Tensor, log_q: Tensor, dim: int = 0, bits_per_dim: int | None = None) -> Tensor:
    bound = reference.importance_weighted_bound(log_p, log_q, dim)
    return bound if bits_per_dim is None else -bound / (bits_per_dim * math.log(2))


_SPECIFICATION = {**samples._SPECIFICATION, "philox_normal": _philox, "importance_weighted_bound": _bound}


@dataclass
class Results:
    """Outputs in order, and gradients by operand (None: the result does not depend on it)."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]

    def items(self) -> dict[str, Tensor | None]:
        return {f"output {k}": t for k, t in enumerate(self.outputs)} | self.gradients


def _flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [t for r in results for t in _flat(r)]


def _differentiate(outputs: list[Tensor], inputs: dict[str, Tensor], upstream: list[Tensor]) -> Results:
    wanted = {name: t for name, t in inputs.items() if t.requires_grad}
    live = [(o, g) for o, g in zip(outputs, upstream, strict=True) if o.requires_grad]
    gradients: tuple = ()
    if wanted and live:
        outs, grads = zip(*live, strict=True)
        gradients = torch.autograd.grad(outs, list(wanted.values()), grads, allow_unused=True)
    return Results([o.detach() for o in outputs], dict(zip(wanted, gradients, strict=False)))


def _specified(
    case: Case, inputs: dict[str, Tensor], options: dict[str, Any], upstream: list[Tensor], dtype: torch.dtype
) -> Results:
    """The specification, computed in `dtype`, with the kernel's noise (philox_normal is its own case).
    An option bg is a difference from fg."""
    wide = {
        n: t.detach().to(dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for n, t in inputs.items()
    }
    if options.get("bg") is not None:
        options = {**options, "bg": wide["fg"] + options["bg"]}
    with mock.patch.object(reference, "philox_normal", samples._kernel_noise):
        outputs = _flat(_SPECIFICATION[case.op](**wide, **options))
    return _differentiate(outputs, wide, [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=True)])


# --- tolerances -----------------------------------------------------------------------------------
#
# A kernel may be off by OPERATIONS roundings of the type it computes in: as far as the exact result
# moves when inputs, upstream gradients and options move by so many roundings each (its condition,
# measured on the float64 specification), and as many roundings of the result and of the numbers of
# order 1 in the formulas, once for each element that is summed. On top come the rounding to a half type
# where one is stored, and the specification's own error in float64.

_NUMBERS = (
    "fg_scale", "bg_scale", "scale", "fg_weight", "bg_weight", "prior_logits", "free_bits", "prior_mu",
    "prior_logvar", "mu", "logvar",
)  # fmt: skip


def _moved(
    case: Case, inputs: dict[str, Tensor], upstream: list[Tensor], step: float
) -> Iterator[tuple[dict[str, Tensor], dict[str, Any], list[Tensor]]]:
    """(inputs, options, upstream gradients) with one of them moved by a relative step, up and down:
    as a whole, and element by element."""
    generator = torch.Generator().manual_seed(case.seed)
    wide = {n: t.detach().double() if t.is_floating_point() else t for n, t in inputs.items()}
    size = {n: t.abs() for n, t in wide.items() if inputs[n].is_floating_point()}
    if "target" in size:
        # The differences from a target are rounded for fg and bg apart.
        size |= {n: torch.maximum(size[n], size["target"]) for n in ("fg", "bg", "prediction") if n in size}
        if "slots" in size:
            dim = case.options.get("batch_dims", 1)
            size["slots"] = torch.maximum(size["slots"], size["target"].unsqueeze(dim))

    def steps(t: Tensor) -> Iterator[Tensor]:
        for shape in (t.shape, ()) if t.numel() > 1 else ((),):
            signs = (2 * torch.randint(2, shape, generator=generator) - 1).to(t.device)
            yield from (step * signs, -step * signs)

    def leaves(**moved: Tensor) -> dict[str, Tensor]:
        return {n: t.clone().requires_grad_(inputs[n].requires_grad) for n, t in (wide | moved).items()}

    for name, largest in size.items():
        for h in steps(largest):
            yield leaves(**{name: wide[name] + h * largest}), case.options, upstream
    if case.options.get("bg", 0) is None:
        # fg stands for both layers, and its likelihoods are rounded apart.
        for h in steps(size["fg"]):
            yield leaves(), {**case.options, "bg": h * size["fg"]}, upstream
    for name in _NUMBERS:
        if case.options.get(name):
            for h in (step, -step):
                yield leaves(), {**case.options, name: case.options[name] * (1 + h)}, upstream
    for k, g in enumerate(upstream if case.grad else ()):
        for h in steps(g):
            there = [*upstream]
            there[k] = g.double() * (1 + h)
            yield leaves(), case.options, there


def _condition(
    case: Case, inputs: dict[str, Tensor], upstream: list[Tensor], exact: Results, step: float
) -> dict[str, Tensor]:
    """How far each result moves where everything it is computed from moves by a relative step."""
    total = {n: torch.zeros_like(t) for n, t in exact.items().items() if t is not None}
    for moved in _moved(case, inputs, upstream, step):
        there = _specified(case, *moved, torch.float64).items()
        for name in total:
            if there[name] is not None:
                # Up and down both count: half of their sum is the slope, where there is one.
                change = (there[name] - exact.items()[name]).abs()
                total[name] += change.nan_to_num(0.0, 0.0)
    return total


def _error_of_float64(exact: Tensor, float32: Tensor) -> float:
    """The specification's own error in float64, from what it makes of the same numbers in float32."""
    error = (float32.double() - exact).abs()
    error = error[error.isfinite()]
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return 8 * ratio * error.max().item() if error.numel() else 0.0


def _error_of_sigmoid(case: Case, inputs: dict[str, Tensor], upstream: list[Tensor]) -> Tensor:
    """What autograd's y (1 - y) for the slope of y = sigmoid loses in float64 where y is near 1, times the
    difference of the logits that it multiplies. (In float32 it loses everything, which hides it from
    _error_of_float64.)"""
    prior = inputs.get("prior_logits", case.options.get("prior_logits", 0.0))
    difference = (inputs["logits"].detach().double() - prior).detach().abs().nan_to_num(0.0, 0.0)
    arriving = upstream[0].double().abs().sum()
    return 4 * torch.finfo(torch.float64).eps * arriving.clamp(max=8) * difference


def _summed(case: Case, exact: Results, upstream: list[Tensor]) -> dict[str, float]:
    """How many numbers of order 1 each result is the sum of, times what multiplies the sum."""
    operands = list(case.operands.values())
    if case.op in ("philox_normal", "reparameterize", "importance_weighted_bound"):
        return dict.fromkeys(exact.items(), float(case.options.get("num_samples", 1)))
    shape, batch_dims = operands[0].shape, case.options.get("batch_dims", 1)
    batch, numel = max(math.prod(shape[:batch_dims]), 1), max(math.prod(shape), 1)
    reduction = case.options.get("reduction", "batchmean")
    factor = {"batchmean": 1 / batch, "mean": 1 / numel}.get(reduction, 1.0)
    count = {"none": 1, "sample": numel / batch}.get(reduction, numel)
    if case.op == "mixture_reconstruction_loss":
        count *= shape[batch_dims]  # joint channels are summed first
    if "slots" in case.operands:
        factor *= shape[batch_dims]  # a mean is over elements, of which there are fewer than of slots
    weight = max(abs(case.options.get(n, 1.0)) for n in ("fg_weight", "bg_weight"))
    if "weight" in case.operands:
        weights = make(case, "weight", torch.device("cpu")).detach().double().abs()
        weights = weights[weights.isfinite()]
        weight *= max(1.0, weights.max().item()) if weights.numel() else 1.0
    if case.options.get("normalize") == "area":
        area = _smallest_area(case)
        factor *= max(1.0, 1.0 / (area * max(shape[batch_dims], 1))) if area > 0 else 1.0
    sums = {n: max(1.0, weight) * count * factor for n in exact.items()}
    if case.options.get("return_terms"):
        sums |= {f"output {k}": numel / batch for k in (1, 2, 3)}
        factor = max(factor, 1.0)
    if case.options.get("free_bits") or case.op == "sample_gaussian":
        factor = max(factor, float(case.options.get("num_samples", 1)))
    arriving = max([1.0, *(g.abs().max().item() for g in upstream if g.numel())])
    for name, gradient in exact.gradients.items():
        elements = numel / max(gradient.numel() if gradient is not None else 1, 1)
        sums[name] = max(1.0, weight) * factor * elements * arriving
    return sums


def _smallest_area(case: Case) -> float:
    """The smallest positive area of a region, in pixels (0: there is none)."""
    name = "mask" if "mask" in case.operands else "mask_logits"
    batch_dims = case.options.get("batch_dims", 1)

    def numbers(name: str) -> Tensor:
        t = make(case, name, torch.device("cpu")).detach()
        return t.double() if t.is_floating_point() else t.ne(0).double()

    on = numbers(name)
    on, off = (torch.sigmoid(on), torch.sigmoid(-on)) if name == "mask_logits" else (on, 1 - on)
    weight = numbers("weight") if "weight" in case.operands else torch.ones((), dtype=torch.float64)
    areas = torch.cat([(weight * m).flatten(0, batch_dims - 1).mean(1).flatten(1).sum(1) for m in (on, off)])
    areas = areas[areas > 0]
    return areas.min().item() if areas.numel() else 0.0


# --- the check ------------------------------------------------------------------------------------


def _upstream(case: Case, outputs: list[Tensor]) -> list[Tensor]:
    """The gradients that arrive, of order 1: numbers that differ, in the layout that was drawn."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    made = [_normal(o.shape, generator).to(o.device, o.dtype) for o in outputs]
    return [in_layout(g, case.upstream, generator) for g in made]


def _call(case: Case, inputs: dict[str, Tensor], device: torch.device) -> list[Tensor]:
    where = {"device": device} if case.op == "philox_normal" else {}
    return _flat(getattr(fgbg_cuda, case.op)(**inputs, **case.options, **where))


def check(case: Case, device: torch.device | str = "cpu") -> None:
    """Runs the case and compares it with the specification."""
    device = torch.device(device)
    inputs = {name: make(case, name, device) for name in case.operands}
    before = {name: t.detach().clone() for name, t in inputs.items()}
    torch.set_num_threads(case.threads)
    with _kernel_calls() as calls:
        outputs = _call(case, inputs, device)
        upstream = _upstream(case, outputs)
        actual = _differentiate(outputs, inputs, upstream)
    torch.set_num_threads(1)
    _check_form(case, inputs, outputs, actual)
    with torch.no_grad():
        for k, (a, b) in enumerate(zip(outputs, _call(case, inputs, device), strict=True)):
            assert _same(a.detach(), b), f"output {k} depends on threads or on grad mode"
    for name, t in inputs.items():
        assert _same(t.detach(), before[name]), f"{name} was written to"

    operands = [t for t in inputs.values() if t.is_floating_point()]
    compute = reference.compute_dtype(*operands)
    exact = _specified(case, inputs, case.options, upstream, torch.float64)
    step = OPERATIONS * torch.finfo(compute).eps
    condition = _condition(case, inputs, upstream, exact, step)
    summed = _summed(case, exact, upstream)
    float32 = _specified(case, inputs, case.options, upstream, torch.float32).items()
    in_type = float32 if compute == torch.float32 else exact.items()
    extreme = case.wild or not all(t is None or bool(t.isfinite().all()) for t in in_type.values())
    narrow = in_type if extreme else {}
    compared = sharp = 0
    for name, a in actual.items().items():
        e = exact.items()[name]
        if a is None or e is None:
            # An operand the result does not depend on; a gradient of zeros says the same.
            assert e is None or not e.any(), f"{name}: no gradient, expected {e}"
            assert a is None or not a.any(), f"{name}: a gradient {a}, expected none"
            continue
        assert a.shape == e.shape, f"{name}: {a.shape} is not {e.shape}"
        if case.op == "philox_normal":
            e = e.to(device)
            bound = torch.full_like(e, 2e-6)  # of the float32 Box-Muller
        else:
            bound = condition[name] + step * (e.abs() + summed[name]) + _error_of_float64(e, float32[name])
            if case.op == "bernoulli_kl" and name == "logits":
                bound = bound + _error_of_sigmoid(case, inputs, upstream)
        # A gradient in a narrower type than the computation's is rounded for an upstream gradient of one, and
        # again for what arrives.
        roundings = 2 if name in actual.gradients and a.dtype not in (torch.float16, compute) else 1
        wrong = _wrong(a, e, bound, narrow.get(name), roundings)
        if name in actual.gradients and (extreme or not a.isfinite().all()):
            wrong &= ~_undefined(case, a, e, inputs, name, compute)
        if wrong.any():
            raise AssertionError(_report(case, name, a, e, bound, narrow.get(name), wrong))
        finite = e.isfinite()
        compared += int(finite.sum())
        sharp += int((bound <= 1e-2 * e.abs().clamp(min=e[finite].abs().mean()))[finite].sum())
    COUNTS["cases"] += 1
    COUNTS[case.op] += 1
    COUNTS["reach a kernel"] += bool(calls)
    COUNTS["reach a backward kernel"] += bool(calls and actual.gradients)
    COUNTS["compare finite numbers"] += compared > 0
    COUNTS["compare them to a percent or better"] += sharp > 0.5 * compared > 0
    COUNTS["wild"] += case.wild


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _check_form(case: Case, inputs: dict[str, Tensor], outputs: list[Tensor], actual: Results) -> None:
    operands = [t for t in inputs.values() if t.is_floating_point()]
    for k, o in enumerate(outputs):
        if case.op == "philox_normal":
            dtype = case.options.get("dtype", torch.float32)
        elif k == 0 and case.op in ("reparameterize", "sample_gaussian"):
            dtype = torch.promote_types(inputs["mu"].dtype, inputs["logvar"].dtype)
        else:
            dtype = reference.compute_dtype(*operands)
        assert o.dtype == dtype, f"output {k} is {o.dtype}, expected {dtype}"
    if any(t.requires_grad for t in operands):
        assert any(o.requires_grad for o in outputs), "no gradient"
    else:
        assert not any(o.requires_grad for o in outputs), "a gradient that nobody asked for"
    for name, g in actual.gradients.items():
        assert g is None or (g.dtype, g.shape) == (inputs[name].dtype, inputs[name].shape), name


def _wrong(a: Tensor, e: Tensor, bound: Tensor, narrow: Tensor | None, roundings: int) -> Tensor:
    """Where `a` is neither within `bound` of the exact numbers nor, if there are special values, what
    the formula gives in the type the kernel computes in (where it may overflow or divide 0 by 0)."""
    info = torch.finfo(a.dtype)
    a = a.double()

    def agrees(e: Tensor) -> Tensor:
        half_ulp = 0.5 * info.eps * (e.abs() + bound) * (1 + info.eps) + info.smallest_normal * info.eps
        within = bound + roundings * half_ulp
        overflows = (e.abs() + within >= info.max) & (a == e.sign() * math.inf)
        close = e.isfinite() & ((a - e).abs() <= within)
        return close | (a == e) | (a.isnan() & e.isnan()) | overflows

    right = agrees(e)
    if narrow is not None:
        right |= agrees(narrow.double())
    return ~right


def _undefined(
    case: Case, a: Tensor, e: Tensor, inputs: dict[str, Tensor], name: str, compute: torch.dtype
) -> Tensor:
    """Where autograd's derivative of the formula is no evidence against the kernel's."""
    odd = _not_finite(inputs, inputs[name])
    # Whether an infinity makes a derivative infinite or NaN is a matter of the order of its factors; at
    # an infinite operand the derivative may have a limit, which autograd does not take.
    undefined = e.isnan() & (~a.isfinite() | odd)
    # A derivative may overflow before a small upstream gradient scales it down.
    undefined |= (e.abs() > 1e-6 * torch.finfo(compute).max) & ~a.isfinite()
    if case.options.get("likelihood") in ("laplace", "absolute_error"):
        # torch has 0 for the derivative of |x| where x is NaN, the kernels NaN.
        undefined |= a.isnan() & odd
    if case.op == "categorical_kl" and "prior_logits" in inputs:
        # The KL is inf where the prior alone excludes an outcome: its derivatives are a matter of form.
        logits, prior = (inputs[n].detach() for n in ("logits", "prior_logits"))
        forbidden = ((logits > -math.inf) & (prior == -math.inf)).any(case.options.get("dim", 1), True)
        undefined |= _any_to(forbidden.expand_as(logits), a.shape)
    if case.op == "bernoulli_kl" and "prior_logits" in inputs:
        # Both infinite: the KL is NaN, inf - inf, and so are the kernel's derivatives.
        both = inputs["logits"].detach().isinf() & inputs["prior_logits"].detach().isinf()
        undefined |= a.isnan() & _any_to(both, a.shape)
    return undefined


def _any_to(condition: Tensor, shape: torch.Size) -> Tensor:
    """Of each element of an operand: whether it holds anywhere that the operand is broadcast to."""
    while condition.dim() > len(shape):
        condition = condition.any(0)
    for d, n in enumerate(shape):
        if condition.shape[d] != n:
            condition = condition.any(d, keepdim=True)
    return condition


def _not_finite(inputs: dict[str, Tensor], operand: Tensor) -> Tensor:
    """Of each element of `operand`: whether any operand there is infinite or NaN."""
    if "slots" in inputs:  # of which the cases have -inf in masks alone
        return torch.zeros_like(operand, dtype=torch.bool)
    operands = [t.detach().double() for t in inputs.values()]
    if "target" in inputs:  # of images: scales of channels have other shapes
        least = max(operand.dim(), 1) if operand.dim() < 2 else 2
        operands = [t for t in operands if t.dim() == least or t.dim() > 1 < least]
        if operand.dim() < 2:
            operands += [t.detach().double().sum() for t in inputs.values()]
    odd = ~torch.stack(torch.broadcast_tensors(*operands)).isfinite().all(0)
    return _any_to(odd, operand.shape)


def _report(case: Case, name: str, a: Tensor, e: Tensor, bound: Tensor, narrow: Any, wrong: Tensor) -> str:
    at = tuple(wrong.nonzero()[0].tolist())
    lines = [
        f"{name}{list(at)}: {a[at].item()!r}, expected {e[at].item()!r} within {bound[at].item():.3g} "
        f"({int(wrong.sum())} of {wrong.numel()} elements are wrong)"
    ]
    if narrow is not None:
        lines.append(f"the formula in the kernel's type gives {narrow[at].item()!r}")
    return "\n".join([*lines, f"check({case!r})"])


# --- calls that must be refused -------------------------------------------------------------------


def _longer(t: Tensor) -> Tensor:
    """One more of the last dimension, or of the batch where there is no other."""
    return torch.cat([t, t.narrow(-1, 0, 1) if t.shape[-1] else t.new_zeros((*t.shape[:-1], 1))], -1)


# What no operand may be. The second table holds for those that have another to agree with.
_BAD_TENSORS = {
    "text": lambda t: "tensor",
    "list": lambda t: [t],
    "array": lambda t: t.float().cpu().resolve_neg().numpy(),
    "int64": lambda t: t.nan_to_num().to(torch.int64),
    "complex64": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.float().to(torch.float8_e4m3fn),
    "sparse": lambda t: t.float().contiguous().to_sparse(),
    "jagged": lambda t: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "nested": lambda t: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
}
_BAD_COMPANIONS = {
    "another rank": lambda t: t[None],
    "longer": _longer,
    "scalar": lambda t: t.new_zeros(()),
    "elsewhere": lambda t: t.to("meta"),
}
# Shapes that no image has: applied to every operand but scales.
_BAD_IMAGES = {
    "no channels": lambda t: t[:, :0],
    "no spatial dimensions": lambda t: t.flatten(1)[:, :1],
    "4 spatial dimensions": lambda t: t.reshape(*t.shape[:2], *(1,) * (6 - t.dim()), *t.shape[2:]),
}
_NOT_A_NUMBER = (math.nan, math.inf, -math.inf, "1", None, True, 1j, [1.0])
_BAD_SCALES = (*_NOT_A_NUMBER, 0, -1.0, torch.ones(97), torch.ones(1, dtype=torch.int64))
_BAD_OPTIONS = {
    "reduction": ("avg", "", None, 3, b"sum"),
    "likelihood": ("normal", None, 0),
    "channels": ("all", None, 3),
    "normalize": ("pixels", "", True, 1),
    "return_terms": (1, None, "yes"),
    "fg_scale": _BAD_SCALES,
    "bg_scale": _BAD_SCALES,
    "scale": _BAD_SCALES,
    "fg_weight": (*_NOT_A_NUMBER, torch.ones(())),
    "bg_weight": (*_NOT_A_NUMBER, torch.ones(())),
    "prior_logits": _NOT_A_NUMBER,
    "free_bits": (*_NOT_A_NUMBER, -0.1),
    "seed": (1.5, "1", True, 2**63, -(2**63) - 1, torch.ones(2, dtype=torch.int64), torch.ones(1)),
    "generator": (3, "seed", torch.Generator()),  # the last: beside a seed
    "offset": (-1, 2**63, 1.5, None, "0", True, torch.ones((), dtype=torch.int64)),
    "num_samples": (0, -1, 2.0, "2", True),
    "size": (3, None, "ab", [-1], [1.5], [None], [True], [2**63]),
    "dtype": (torch.int64, torch.complex64, "float32", None, 3),
    "device": ("nowhere", 1.5),
    "dim": (99, -99, 0.0, None, "0"),
    "bits_per_dim": (0, -1, 1.5, "1"),
    "batch_dims": (0, -1, 1.5, "1", None, True, 99),
    "mask": (torch.ones(1), None),
    "mask_logits": (torch.ones(1), None),
}


@st.composite
def refusals(draw: Any) -> tuple[Case, str, Any]:
    """A valid call, the argument to spoil, and how: a key of the tables of tensors, or the value."""
    case = draw(cases())
    parameters = inspect.signature(getattr(fgbg_cuda, case.op)).parameters
    if "fg" in case.operands and "batch_dims" not in case.options and _one_in(draw, 8):
        return case, "fg", draw(st.sampled_from(tuple(_BAD_IMAGES)))
    name = draw(st.sampled_from(sorted(parameters)))
    shape = case.operands[name].shape if name in case.operands else ()
    if name not in _BAD_OPTIONS or (name in case.operands and draw(st.booleans())):
        # (What may be broadcast may have any of many shapes.)
        broadcast = name.endswith("scale") or name == "weight"
        companions = len(shape) > 0 and len(case.operands) > 1 and not broadcast
        # A mask of [B, 1] may become one of [B, C] by another rank or by one channel more.
        kinds = [*_BAD_TENSORS, *(_BAD_COMPANIONS if companions else ())]
        return case, name, draw(st.sampled_from(kinds))
    return case, name, draw(st.sampled_from(_BAD_OPTIONS[name]))


def check_refused(case: Case, name: str, how: Any, device: torch.device | str = "cpu") -> None:
    """The spoiled call raises ValueError or TypeError, which names an argument, and does no work."""
    device = torch.device(device)
    arguments = {n: make(case, n, device) for n in case.operands} | case.options
    parameters = inspect.signature(getattr(fgbg_cuda, case.op)).parameters
    tables = _BAD_TENSORS | _BAD_COMPANIONS
    if name == "fg" and how in _BAD_IMAGES:
        images = [n for n in case.operands if not n.endswith("scale") and n != "weight"]
        arguments |= {n: _BAD_IMAGES[how](arguments[n].detach()) for n in images}
    elif name not in _BAD_OPTIONS or (name in case.operands and isinstance(how, str) and how in tables):
        given = arguments.get(name)
        like = given if isinstance(given, Tensor) else torch.ones(2, 3, device=device)
        arguments[name] = tables[how](like.detach())
    else:
        arguments[name] = how
    if name in ("mask", "mask_logits") and how is None:
        arguments |= {n: None for n in ("mask", "mask_logits") if n in parameters}
    with _kernel_calls() as calls:
        try:
            getattr(fgbg_cuda, case.op)(**arguments)
        except (ValueError, TypeError) as error:
            message = str(error)
        else:
            raise AssertionError(
                f"accepted {name}={arguments[name]!r}\ncheck_refused({case!r}, {name!r}, {how!r})"
            )
    assert any(p in message for p in parameters), f"names no argument: {message}"
    assert not calls, "refused after work was done"
    COUNTS["refused"] += 1
    COUNTS[f"refused {name}"] += 1


# --- kernels reached ------------------------------------------------------------------------------


class Eager:
    """Stands in for the functions of ``fgbg_cuda._C``, each changed by ``change(name, function)``."""

    def __init__(self, change: Callable[[str, Callable], Callable]):
        original = _routes.eager
        for name in (n for n in dir(original) if not n.startswith("__")):
            value = getattr(original, name)
            setattr(self, name, change(name, value) if name in KERNELS else value)


KERNELS = (
    "philox_normal",
    "reparameterize",
    "gaussian_kl",
    "sample_gaussian",
    "gaussian_log_prob",
    "bernoulli_kl",
    "categorical_kl",
    "reconstruction_loss",
    "slot_loss",
)


class _kernel_calls:
    """Counts eager calls that ran a kernel on at least one element."""

    def __enter__(self) -> Counter[str]:
        calls: Counter[str] = Counter()

        def counting(name: str, function: Callable) -> Callable:
            def call(*args: Any) -> Any:
                result = function(*args)
                if result is not None:
                    tensors = [t for t in args if isinstance(t, Tensor)]
                    calls[name] += (result if name == "philox_normal" else tensors[0]).numel() > 0
                return result

            return call

        self._patch = mock.patch.object(_routes, "eager", Eager(counting))
        self._patch.start()
        return calls

    def __exit__(self, *error: Any) -> None:
        self._patch.stop()
