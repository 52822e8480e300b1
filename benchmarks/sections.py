"""The parts of a run. Each is a list of jobs, a job gives one row of its table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from .cases import Case, all_cases, image_case, latent_case, quick_cases
from .comparison import compare
from .determinism import determinism, threads
from .machine import usable_cores
from .timing import FULL, QUICK, Effort
from .training_step import training_step

Job = Callable[[], dict]
# Outside the ops, where graphs and Triton have their say.
PLAIN_PEERS = ("ours", "eager", "compile")


@dataclass(frozen=True)
class Options:
    device: str
    dtypes: list[torch.dtype]
    peers: tuple[str, ...]
    quick: bool

    @property
    def effort(self) -> Effort:
        return QUICK if self.quick else FULL

    def among(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(name for name in names if name in self.peers)


def ops(options: Options) -> list[Job]:
    """Every op at every size and dtype against every peer; peak memory too."""
    makers = (quick_cases if options.quick else all_cases)(options.dtypes, options.device)
    few = tuple(name for name in options.peers if "compile" not in name)
    jobs = []
    for i, make in enumerate(makers):
        names = few if options.quick and i > 0 else options.peers  # compilation takes seconds: one case of it
        jobs.append(lambda make=make, names=names: compare(make(), names, options.effort))
    return jobs


def step(options: Options) -> list[Job]:
    """A training step of a small VAE, with our ops and with plain ones, eager and compiled."""
    sizes = ((4, 3, 8, 8),) if options.quick else ((64, 1, 28, 28), (64, 3, 64, 64))
    compiled = not options.quick and "compile" in options.peers
    return [lambda s=s: training_step(s, options.device, options.effort, compiled) for s in sizes]


def _pair(
    options: Options, image: tuple[int, ...], latent: tuple[int, ...], op: str
) -> list[Callable[[], Case]]:
    dtype, device = options.dtypes[0], options.device
    return [
        lambda: image_case("masked", "gaussian", image, dtype, device),
        lambda: latent_case(op, latent, dtype, device),
    ]


def cost_of_determinism(options: Options) -> list[Job]:
    """Times in and out of torch's deterministic mode, and who gives the same bits."""
    image, latent = ((4, 3, 8, 8), (8, 4)) if options.quick else ((64, 3, 64, 64), (4096, 1024))
    names = _without_compile(options) if options.quick else options.among((*PLAIN_PEERS, "triton"))
    pair = _pair(options, image, latent, "gaussian_kl")
    return [lambda make=make: determinism(make(), names, options.effort) for make in pair]


def scaling(options: Options) -> list[Job]:
    """The same work on one thread and on two (CPU)."""
    if options.device != "cpu":
        return []
    image, latent = ((4, 3, 8, 8), (8, 4)) if options.quick else ((16, 3, 256, 256), (4096, 1024))
    names = _without_compile(options) if options.quick else options.among(PLAIN_PEERS)

    def job(make: Callable[[], Case], number: int) -> dict:
        with threads(number):
            return compare(make(), names, options.effort)

    counts = [n for n in (1, 2) if n <= usable_cores()]
    pair = _pair(options, image, latent, "sample_gaussian")
    return [lambda make=make, n=n: job(make, n) for make in pair for n in counts]


def growth(options: Options) -> list[Job]:
    """Time over four decades of size: 10^3 to 10^7 elements."""
    batches = (1, 10) if options.quick else (1, 10, 100, 1000, 10000)
    names = _without_compile(options) if options.quick else options.among(PLAIN_PEERS)
    jobs = []
    for batch in batches:
        pair = _pair(options, (batch, 1, 32, 32), (batch, 1024), "sample_gaussian")
        jobs += [lambda make=make: compare(make(), names, options.effort) for make in pair]
    return jobs


def _without_compile(options: Options) -> tuple[str, ...]:
    return options.among(("ours", "eager"))


SECTIONS: dict[str, Callable[[Options], list[Job]]] = {
    "ops": ops,
    "step": step,
    "determinism": cost_of_determinism,
    "threads": scaling,
    "growth": growth,
}
