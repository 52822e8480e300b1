"""The one place that decides which arguments are valid, for every public function.

A ValueError or TypeError names the argument, what came, and what is accepted, before any work is done.
Tensor *values* are not looked at: that would synchronise with a GPU, and IEEE arithmetic already says
what becomes of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from ._ops import _C

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MASKS = (*FLOATS, torch.bool, torch.uint8)
REDUCTIONS = ("none", "sample", "batchmean", "sum", "mean")
LIKELIHOODS = tuple(reference.LIKELIHOODS)


def _names(choices: Sequence) -> str:
    return ", ".join(repr(c) if isinstance(c, str) else str(c) for c in choices)


def _alike(*tensors: object) -> bool:
    """Whether these are plain float tensors of one shape on one device, found out the quick way."""
    return not torch.compiler.is_compiling() and _C.alike(*tensors)


def tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {value.dtype}, expected one of {_names(dtypes)}")
    if value.is_nested or value.layout is not torch.strided:
        came = "nested" if value.is_nested else f"of layout {value.layout}"
        raise ValueError(f"{name} is {came}, expected a tensor of layout torch.strided")


def like(name: str, value: object, reference_name: str, other: Tensor) -> None:
    """A float tensor of the shape and on the device of another."""
    tensor(name, value)
    if value.shape != other.shape:
        raise ValueError(
            f"{name} has shape {list(value.shape)}, expected that of {reference_name}, {list(other.shape)}"
        )
    _device(name, value, reference_name, other)


def _device(name: str, value: Tensor, reference_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{name} is on {value.device}, expected the device of {reference_name}, {other.device}"
        )


def choice(name: str, value: object, choices: Sequence[str]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {_names(choices)}, got {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {_names(choices)}")


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def number(name: str, value: object, *, minimum: float = -math.inf, above: float = -math.inf) -> None:
    """A finite Python number, at least ``minimum`` and greater than ``above``."""
    if type(value) is float and minimum <= value < math.inf and value > above:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} is {value}, expected a finite number")
    if value < minimum or value <= above:
        bound = f"greater than {above}" if above > -math.inf else f"at least {minimum}"
        raise ValueError(f"{name} is {value}, expected a number {bound}")


def integer(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < minimum or value >= 2**63:
        raise ValueError(f"{name} is {value}, expected an integer from {minimum} to 2**63 - 1")


def device(value: object) -> torch.device:
    try:
        return torch.device(value)
    except (RuntimeError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"device is {value!r}, expected a device that torch knows") from error


def size(name: str, value: object) -> None:
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} must be a tuple or list of integers, got {type(value).__name__}")
    for n in value:
        integer(f"{name} entry", n, 0)


def seed(value: object, generator: object, device: torch.device | None) -> None:
    """None, an integer, or an int64 tensor of one element on ``device``."""
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        if value is not None:
            raise ValueError("seed and generator were both given, expected at most one of them")
        if device is not None and generator.device.type != device.type:
            raise ValueError(f"generator is on {generator.device}, expected {device}")
    if value is None:
        return
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"seed has dtype {value.dtype}, expected torch.int64")
        if value.numel() != 1:
            raise ValueError(f"seed has shape {list(value.shape)}, expected one element")
        if device is not None and value.device != device:
            raise ValueError(f"seed is on {value.device}, expected the device of mu, {device}")
    elif isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"seed must be an integer or a one-element int64 tensor, got {type(value).__name__}")
    elif not -(2**63) <= value < 2**63:
        raise ValueError(f"seed is {value}, expected an integer from -2**63 to 2**63 - 1")


def latents(mu: object, logvar: object, prior_mu: object = None, prior_logvar: object = None) -> None:
    priors = {n: t for n, t in (("prior_mu", prior_mu), ("prior_logvar", prior_logvar)) if t is not None}
    if not _alike(mu, logvar, *priors.values()):
        tensor("mu", mu)
        for name, value in {"logvar": logvar, **priors}.items():
            like(name, value, "mu", mu)
    if mu.dim() < 1:
        raise ValueError("mu has shape [], expected [B, *D]")


def draws(seed_: object, generator: object, offset: object, num_samples: object, mu: Tensor) -> None:
    seed(seed_, generator, mu.device)
    integer("offset", offset, 0)
    if num_samples is not None:
        integer("num_samples", num_samples, 1)


def kl(reduction: object, free_bits: object) -> None:
    choice("reduction", reduction, REDUCTIONS)
    number("free_bits", free_bits, minimum=0.0)
    if free_bits > 0 and reduction in ("none", "sample"):
        raise ValueError(
            f"reduction is {reduction!r} with free_bits, which floors the batch mean of each latent "
            "dimension; expected 'batchmean', 'sum' or 'mean'"
        )


def images(fg: object, bg: object, target: object, *, single: bool) -> None:
    alike = _alike(fg, fg if bg is None and single else bg, target)
    if not alike:
        tensor("fg", fg)
    if not 3 <= fg.dim() <= 5 or fg.shape[1] == 0:
        raise ValueError(
            f"fg has shape {list(fg.shape)}, expected [B, C, *spatial] with at least one "
            "channel and 1 to 3 spatial dimensions"
        )
    if alike:
        return
    if bg is not None or not single:
        like("bg", bg, "fg", fg)
    like("target", target, "fg", fg)


def one_mask(mask: object, mask_logits: object) -> None:
    if (mask is None) == (mask_logits is None):
        came = "neither" if mask is None else "both"
        raise ValueError(f"mask and mask_logits: {came} given, expected exactly one of them")


def mask(name: str, value: object, fg: Tensor, *, logits: bool, per_channel: bool = True) -> None:
    tensor(name, value, FLOATS if logits else MASKS)
    came, image = value.shape, fg.shape
    channels_fit = len(came) > 1 and (came[1] == 1 or (per_channel and came[1] == image[1]))
    if not (channels_fit and came[0] == image[0] and came[2:] == image[2:]):
        one = [image[0], 1, *image[2:]]
        accepted = [one, list(image)] if per_channel and image[1] > 1 else [one]
        raise ValueError(
            f"{name} has shape {list(value.shape)}, expected "
            f"{' or '.join(map(str, accepted))} for fg of shape {list(fg.shape)}"
        )
    _device(name, value, "fg", fg)


def scale(name: str, value: object, likelihood: str, fg: Tensor) -> None:
    """A positive number, or a float tensor of one element or one per channel."""
    if isinstance(value, Tensor):
        tensor(name, value)
        if value.dim() > 1 or value.numel() not in (1, fg.shape[1]):
            raise ValueError(
                f"{name} has shape {list(value.shape)}, expected [], [1] or one per channel, [{fg.shape[1]}]"
            )
        _device(name, value, "fg", fg)
    else:
        number(name, value, above=0.0)
    if likelihood not in reference.SCALED_LIKELIHOODS and (isinstance(value, Tensor) or value != 1):
        raise ValueError(
            f"{name} was given, but likelihood {likelihood!r} has no scale; expected one of "
            f"{_names(reference.SCALED_LIKELIHOODS)}"
        )
