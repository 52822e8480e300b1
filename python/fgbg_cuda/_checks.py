"""Which Python values the public functions accept: numbers, words that choose a way in Python, flags.

What is accepted of tensors and of the words that C++ reads is decided in csrc/ops (``check()`` of each op)
and csrc/eager.cpp. Numbers are checked here, since in a compiled graph they have a value only here.
A ValueError or TypeError names the argument, what came, and what is accepted, before any work is done.
Tensor *values* are not looked at: that would synchronise with a GPU, and IEEE arithmetic already says what
becomes of them.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import reference

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _names(choices: Sequence[object]) -> str:
    return ", ".join(repr(c) if isinstance(c, str) else str(c) for c in choices)


def number(name: str, value: Any, *, minimum: float = -math.inf, above: float = -math.inf) -> float:
    """``value`` as a finite float, at least ``minimum`` and greater than ``above``. What has ``__float__`` or
    ``__index__`` is a number, NumPy's scalars among them; bools, tensors and arrays are not."""
    if type(value) is float and minimum <= value < math.inf and value > above:
        return value
    if not is_compiling():
        value = _as_float(name, value)
    elif isinstance(value, (bool, str, complex, Tensor)) or value is None:
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} is {value}, expected a finite number")
    if value < minimum or value <= above:
        bound = f"greater than {above}" if above > -math.inf else f"at least {minimum}"
        raise ValueError(f"{name} is {value}, expected a number {bound}")
    return value


def _as_float(name: str, value: Any) -> float:
    real = isinstance(value, numbers.Real) or (
        (hasattr(value, "__float__") or hasattr(value, "__index__"))
        and not isinstance(value, (Tensor, numbers.Complex, np.bool_))
        and getattr(value, "ndim", 0) == 0
    )
    if real and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def tensor_or_number(name: str, value: Any, *, above: float = -math.inf) -> Any:
    """A tensor, which C++ checks, or a number."""
    if isinstance(value, Tensor):
        return value
    return number(name, value, above=above)


def integer(name: str, value: Any, minimum: int = -(2**63), expected: str = "an integer") -> int:
    """``value`` as an integer of 64 bits, at least ``minimum``. What has ``__index__`` is one, NumPy's
    scalars among them; bools, tensors and arrays are not."""
    if type(value) is int and minimum <= value < 2**63:
        return value
    if isinstance(value, (bool, np.bool_, Tensor)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    try:
        value = operator.index(value)
    except TypeError as error:  # of an array of several numbers
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}") from error
    if value < minimum or value >= 2**63:
        least = "-2**63" if minimum < 0 else minimum
        raise ValueError(f"{name} is {value}, expected an integer from {least} to 2**63 - 1")
    return value


def seed(value: Any) -> Any:
    """A tensor, which C++ checks, or an integer."""
    if type(value) is not int and isinstance(value, Tensor):
        return value
    return integer("seed", value, expected="an integer or a one-element int64 tensor")


def size(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"size must be a tuple or list of integers, got {type(value).__name__}")
    for n in value:
        if type(n) is not int or not 0 <= n < 2**63:
            return tuple([integer("size entry", n, 0) for n in value])
    return tuple(value)


def scale(name: str, value: Any, likelihood: object) -> Tensor | float:
    """A positive number, or a tensor (whose shape C++ checks), of a likelihood that has one."""
    if type(value) is not float or not 0.0 < value < math.inf:  # what is usual without a call more
        value = tensor_or_number(name, value, above=0.0)
    if likelihood in reference.SCALED_LIKELIHOODS:
        return value  # before it is looked at: each look is one more graph for a number that changes
    if likelihood in reference.LIKELIHOODS and (isinstance(value, Tensor) or value != 1.0):
        raise ValueError(
            f"{name} was given, but likelihood {likelihood!r} has no scale; expected one of "
            f"{_names(reference.SCALED_LIKELIHOODS)}"
        )
    return value


def choice(name: str, value: object, choices: Sequence[str]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {_names(choices)}, got {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {_names(choices)}")


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def device(value: Any) -> torch.device:
    try:
        return torch.device(value)
    except (RuntimeError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"device is {value!r}, expected a device that torch knows") from error


def generator(value: object, seed: object, device: torch.device) -> None:
    if not isinstance(value, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(value).__name__}")
    if seed is not None:
        raise ValueError("seed and generator were both given, expected at most one of them")
    if value.device.type != device.type:
        raise ValueError(f"generator is on {value.device}, expected {device}")


def free_bits(value: Any, reduction: object) -> float:
    value = number("free_bits", value, minimum=0.0)
    # In this order: each look at a number that changes may be one more graph.
    if reduction in ("none", "sample") and value > 0:
        raise ValueError(
            f"reduction is {reduction!r} with free_bits, which floors the batch mean of each latent "
            "dimension; expected 'batchmean', 'sum' or 'mean'"
        )
    return value


def one_mask(mask: object, mask_logits: object, name: str = "mask") -> None:
    if (mask is None) == (mask_logits is None):
        came = "neither" if mask is None else "both"
        raise ValueError(f"{name} and mask_logits: {came} given, expected exactly one of them")


def sample_dimensions(name: str, value: Any, batch_dims: int, others: int) -> None:
    """A tensor whose first ``batch_dims`` dimensions index samples, and that has ``others`` more at least."""
    strided(name, value)
    if value.dim() < batch_dims + others:
        raise ValueError(
            f"{name} has shape {list(value.shape)}, expected at least {batch_dims + others} dimensions, "
            f"{batch_dims} of them of samples (batch_dims)"
        )


def companion(
    name: str, value: Any, other_name: str, other: Tensor, batch_dims: int, broadcasts: bool
) -> None:
    """A tensor whose dimensions of samples are those of another tensor or, if it ``broadcasts``, broadcast to
    them. (What the other dimensions may be, C++ says when those have become one.)"""
    strided(name, value)
    rank = other.dim()
    padded = (1,) * (rank - value.dim()) + value.shape
    fits = value.dim() <= rank if broadcasts else value.dim() == rank
    # Of one length: where torch 2.9 traces a zip, it is strict whatever it is told.
    sizes = zip(padded[:batch_dims], other.shape[:batch_dims], strict=True)
    if not fits or any(n != m and not (broadcasts and n == 1) for n, m in sizes):
        raise ValueError(
            f"{name} has shape {list(value.shape)}, expected one to go with {other_name} of shape "
            f"{list(other.shape)} and its batch_dims={batch_dims} dimensions of samples"
        )


def of_merged(error: ValueError) -> ValueError:
    """What C++ says of shapes some of whose dimensions were made one."""
    of_shapes = "shape" in str(error)
    note = " (the dimensions of samples, and spatial ones beyond three, are told as one)" if of_shapes else ""
    return ValueError(f"{error}{note}")


def strided(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.is_nested or value.layout is not torch.strided:
        came = "nested" if value.is_nested else f"of layout {value.layout}"
        raise ValueError(f"{name} is {came}, expected a tensor of layout torch.strided")


def samples(log_p: Any, log_q: Any, dim: Any, bits_per_dim: Any) -> None:
    """What ``importance_weighted_bound``, which has no kernel, accepts."""
    for name, value in (("log_p", log_p), ("log_q", log_q)):
        strided(name, value)
        if value.dtype not in FLOATS:
            raise TypeError(f"{name} has dtype {value.dtype}, expected one of {_names(FLOATS)}")
    if log_q.shape != log_p.shape or log_q.device != log_p.device:
        raise ValueError(
            f"log_q has shape {list(log_q.shape)} on {log_q.device}, expected those of log_p, "
            f"{list(log_p.shape)} on {log_p.device}"
        )
    integer("dim", dim)
    if not -log_p.dim() <= dim < log_p.dim():
        raise ValueError(f"dim is {dim}, expected a dimension of log_p, of shape {list(log_p.shape)}")
    if bits_per_dim is not None:
        integer("bits_per_dim", bits_per_dim, 1)
