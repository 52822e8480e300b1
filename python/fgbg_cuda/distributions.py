"""Distributions of torch.distributions on the fused ops."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, Normal, constraints, register_kl
from torch.distributions.utils import broadcast_all

from . import _checks
from .functional import gaussian_kl, gaussian_log_prob, reparameterize
from .words import PARAMETERIZATIONS, Parameterization

__all__ = ["Gaussian"]

_NO_SHAPE = Size()


class Gaussian(Distribution):
    """N(mu, exp logvar), for code that is written for ``torch.distributions.Normal``: samples, log-densities
    and KL divergences are ``fgbg_cuda.reparameterize``, ``fgbg_cuda.gaussian_log_prob`` and
    ``fgbg_cuda.gaussian_kl``.

    ``Normal(mu, std)`` is ``Gaussian(mu, std, "std")``. The KL is registered against itself and against
    ``Normal``, in both orders; it is accurate near the prior. ``torch.manual_seed`` governs the samples,
    which are others than those of ``Normal``.

    Args:
        mu, logvar: tensors or numbers that broadcast to each other; at least one is a float tensor.
        parameterization: what ``logvar`` is: ``"logvar"``, ``"log_std"`` or ``"std"``.
        validate_args: as in ``torch.distributions``; checks the values.

    Log-densities and divergences of half precision are in float32.

    Examples:
        >>> q = fgbg_cuda.distributions.Gaussian(torch.zeros(3), torch.zeros(3))
        >>> torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
        tensor([0., 0., 0.])
    """

    support = constraints.real
    has_rsample = True

    def __init__(
        self,
        mu: Tensor | float,
        logvar: Tensor | float,
        parameterization: Parameterization = "logvar",
        validate_args: bool | None = None,
    ) -> None:
        _checks.choice("parameterization", parameterization, PARAMETERIZATIONS)
        if not isinstance(mu, Tensor) and not isinstance(logvar, Tensor):
            raise TypeError("mu and logvar are both numbers, expected at least one tensor")
        self.parameterization = parameterization
        self.mu, self.logvar = broadcast_all(mu, logvar)
        super().__init__(self.mu.shape, validate_args=validate_args)

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        spread = constraints.nonnegative if self.parameterization == "std" else constraints.real
        return {"mu": constraints.real, "logvar": spread}

    def expand(self, batch_shape: Any, _instance: Any = None) -> Gaussian:
        new = self._get_checked_instance(Gaussian, _instance)
        batch_shape = Size(batch_shape)
        new.parameterization = self.parameterization
        new.mu, new.logvar = self.mu.expand(batch_shape), self.logvar.expand(batch_shape)
        super(Gaussian, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        return self.mu

    @property
    def mode(self) -> Tensor:
        return self.mu

    @property
    def stddev(self) -> Tensor:
        if self.parameterization == "std":
            return self.logvar
        return torch.exp(self.logvar if self.parameterization == "log_std" else 0.5 * self.logvar)

    @property
    def variance(self) -> Tensor:
        return torch.exp(self.logvar) if self.parameterization == "logvar" else self.stddev.square()

    def rsample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        shape = self._extended_shape(sample_shape)
        draws = math.prod(shape[: len(shape) - len(self.batch_shape)])
        if draws == 0:
            return self.mu.expand(shape)
        mu, logvar = (t.reshape(1) if t.dim() == 0 else t for t in (self.mu, self.logvar))
        num_samples = draws if len(shape) > len(self.batch_shape) else None
        z = reparameterize(mu, logvar, parameterization=self.parameterization, num_samples=num_samples)
        return z.view(shape)

    def sample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        if not value.is_floating_point():
            value = value.to(self.mu.dtype)
        value = value.expand(torch.broadcast_shapes(value.shape, self.batch_shape))
        z = value.reshape(1) if value.dim() == 0 else value
        log_p = gaussian_log_prob(
            z, self.mu, self.logvar, parameterization=self.parameterization, reduction="none"
        )
        return log_p.view(value.shape)

    def entropy(self) -> Tensor:
        log_std = {
            "logvar": lambda s: 0.5 * s,
            "log_std": lambda s: s,
            "std": torch.log,
        }[self.parameterization](self.logvar)
        return log_std + 0.5 * (1 + math.log(2 * math.pi))

    def cdf(self, value: Tensor) -> Tensor:
        return self._normal().cdf(value)

    def icdf(self, value: Tensor) -> Tensor:
        return self._normal().icdf(value)

    def _normal(self) -> Normal:
        return Normal(self.mu, self.stddev, validate_args=self._validate_args)

    def __repr__(self) -> str:
        shown = f", parameterization={self.parameterization!r}" if self.parameterization != "logvar" else ""
        return f"Gaussian(mu: {self.mu.size()}, logvar: {self.logvar.size()}{shown})"


def _kl(
    mu: Tensor, spread: Tensor, prior_mu: Tensor, prior_spread: Tensor, parameterization: Parameterization
) -> Tensor:
    shape = torch.broadcast_shapes(mu.shape, prior_mu.shape)
    mu, spread = (t.expand(shape or (1,)) for t in (mu, spread))
    kl = gaussian_kl(mu, spread, prior_mu, prior_spread, parameterization=parameterization, reduction="none")
    return kl.view(shape)


@register_kl(Gaussian, Gaussian)
def _kl_gaussian_gaussian(p: Gaussian, q: Gaussian) -> Tensor:
    if p.parameterization == q.parameterization:
        return _kl(p.mu, p.logvar, q.mu, q.logvar, p.parameterization)
    return _kl(p.mu, p.stddev, q.mu, q.stddev, "std")


@register_kl(Gaussian, Normal)
def _kl_gaussian_normal(p: Gaussian, q: Normal) -> Tensor:
    if p.parameterization == "std":
        return _kl(p.mu, p.logvar, q.loc, q.scale, "std")
    log_std = p.logvar if p.parameterization == "log_std" else 0.5 * p.logvar
    return _kl(p.mu, log_std, q.loc, torch.log(q.scale), "log_std")


@register_kl(Normal, Gaussian)
def _kl_normal_gaussian(p: Normal, q: Gaussian) -> Tensor:
    return _kl(p.loc, p.scale, q.mu, q.stddev, "std")
