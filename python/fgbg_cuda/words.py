"""The words that options are given by, as types for annotations of your own."""

# Each set stands here once, for type checkers and for what runs. C++ has the same in csrc/ops/words.cpp and
# csrc/math/likelihood.h; a test compares them.

from __future__ import annotations

from typing import Literal, get_args

Reduction = Literal["none", "sample", "batchmean", "sum", "mean"]
"""What is summed: nothing, each sample, the samples' mean, everything, or the mean over every element."""

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
"""How far a pixel may be from its reconstruction."""

Parameterization = Literal["logvar", "log_std", "std"]
"""What says how wide a Gaussian is."""

Channels = Literal["joint", "independent"]
"""Whether the channels of a pixel belong to one layer, or each to one of its own."""

Normalize = Literal["area"]
"""What the sum over a region is divided by."""

Composition = Literal["masked", "blended", "mixture_joint", "mixture_independent", "plain"]
"""How layers make a pixel; each public loss stands for one or two of them."""

PARAMETERIZATIONS: tuple[Parameterization, ...] = get_args(Parameterization)
CHANNELS: tuple[Channels, ...] = get_args(Channels)
NORMALIZATIONS: tuple[Normalize, ...] = get_args(Normalize)
