"""The words that options are given by. Each set stands here once, for type checkers and for what runs.

C++ has the same sets in csrc/ops/words.cpp and csrc/math/likelihood.h; a test compares them.
"""

from __future__ import annotations

from typing import Literal, get_args

Reduction = Literal["none", "sample", "batchmean", "sum", "mean"]
Likelihood = Literal[
    "gaussian",
    "laplace",
    "charbonnier",
    "bernoulli",
    "continuous_bernoulli",
    "poisson",
    "squared_error",
    "absolute_error",
]
Parameterization = Literal["logvar", "log_std", "std"]
Channels = Literal["joint", "independent"]
Normalize = Literal["area"]
Composition = Literal["masked", "blended", "mixture_joint", "mixture_independent", "plain"]

PARAMETERIZATIONS: tuple[Parameterization, ...] = get_args(Parameterization)
CHANNELS: tuple[Channels, ...] = get_args(Channels)
NORMALIZATIONS: tuple[Normalize, ...] = get_args(Normalize)
