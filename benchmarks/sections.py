"""The parts of a run. Each is a list of jobs, a job gives one row of its table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .cases import FORWARD_OP, FORWARD_SIZE, IMAGE_OPS, LATENT_OPS, Plan, all_plans, quick_plans
from .comparison import compare
from .determinism import determinism, threads
from .machine import usable_cores
from .timing import FULL, QUICK, Effort
from .training_step import training_step

QUICK_IMAGES, QUICK_LATENTS = (4, 3, 8, 8), (8, 4)


class Job(NamedTuple):
    label: str
    run: Callable[[], dict]


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
        """Those of the peers that take part, and in a quick run need no compilation."""
        return tuple(name for name in names if name in self.peers and not (self.quick and "compile" in name))

    def plan(self, op: str, size: tuple[int, ...]) -> Plan:
        return Plan(op, size, self.dtypes[0], self.device)


def _comparison(plan: Plan, names: tuple[str, ...], options: Options) -> Job:
    return Job(str(plan), lambda: compare(plan.make(), names, options.effort))


def ops(options: Options) -> list[Job]:
    """Every op at every size and dtype against every peer; peak memory too."""
    plans = (quick_plans if options.quick else all_plans)(options.dtypes, options.device)
    # Compilation takes seconds: a quick run has one case of it.
    few = options.among(options.peers)
    return [_comparison(plan, few if i else options.peers, options) for i, plan in enumerate(plans)]


def step(options: Options) -> list[Job]:
    """A training step of a small VAE, with our ops and with plain ones, eager and compiled."""
    sizes = (QUICK_IMAGES,) if options.quick else ((64, 1, 28, 28), (64, 3, 64, 64))
    compiled = not options.quick and "compile" in options.peers
    return [
        Job(
            f"training step {size}", lambda s=size: training_step(s, options.device, options.effort, compiled)
        )
        for size in sizes
    ]


def cost_of_determinism(options: Options) -> list[Job]:
    """Times in and out of torch's deterministic mode, and who gives the same bits."""
    image, latent = (QUICK_IMAGES, QUICK_LATENTS) if options.quick else ((64, 3, 64, 64), (4096, 1024))
    names = options.among(("ours", "eager", "compile", "triton"))
    return [
        Job(str(plan), lambda plan=plan: determinism(plan.make(), names, options.effort))
        for plan in (options.plan("masked gaussian", image), options.plan("gaussian_kl", latent))
    ]


def scaling(options: Options) -> list[Job]:
    """The same work on one thread and on two (CPU)."""
    if options.device != "cpu":
        return []
    image, latent = (QUICK_IMAGES, QUICK_LATENTS) if options.quick else ((16, 3, 256, 256), (4096, 1024))
    names = options.among(("ours", "eager", "compile"))
    jobs = []
    for plan in (options.plan("masked gaussian", image), options.plan("sample_gaussian", latent)):
        for number in (n for n in (1, 2) if n <= usable_cores()):
            job = _comparison(plan, names, options)
            jobs.append(Job(f"{plan}, {number} threads", lambda n=number, job=job: _with_threads(n, job)))
    return jobs


def _with_threads(number: int, job: Job) -> dict:
    with threads(number):
        return job.run()


def growth(options: Options) -> list[Job]:
    """Time over four decades of size: 10^3 to 10^7 elements."""
    batches = (1, 10) if options.quick else (1, 10, 100, 1000, 10000)
    names = options.among(("ours", "eager", "compile"))
    plans = [options.plan("masked gaussian", (batch, 1, 32, 32)) for batch in batches]
    plans += [options.plan("sample_gaussian", (batch, 1024)) for batch in batches]
    return [_comparison(plan, names, options) for plan in plans]


LARGEST: dict[str, tuple[int, ...]] = {op: (64, 3, 256, 256) for op in IMAGE_OPS}
LARGEST |= {"bernoulli_kl": (64, 1, 256, 256), FORWARD_OP: FORWARD_SIZE}
LARGEST |= {op: (4096, 1024) for op in LATENT_OPS}


def bandwidth(options: Options) -> list[Job]:
    """Every op at its largest size, in every dtype, against eager: how near it comes to a copy's speed."""
    names = options.among(("ours", "eager"))
    sizes = {op: (QUICK_LATENTS if op in LATENT_OPS else QUICK_IMAGES) for op in LARGEST}
    sizes = sizes if options.quick else LARGEST
    plans = [Plan(op, size, dtype, options.device) for dtype in options.dtypes for op, size in sizes.items()]
    return [_comparison(plan, names, options) for plan in plans]


def peers(options: Options) -> list[Job]:
    """Four cases against every peer."""
    large, image, latent = (64, 3, 256, 256), (64, 3, 64, 64), (4096, 1024)
    if options.quick:
        large, image, latent = QUICK_IMAGES, QUICK_IMAGES, QUICK_LATENTS
    cases = {
        "masked gaussian": large,
        "mixture gaussian": image,
        "gaussian_kl": latent,
        "sample_gaussian": latent,
    }
    return [_comparison(options.plan(*case), options.among(options.peers), options) for case in cases.items()]


def small(options: Options) -> list[Job]:
    """Sizes at which the call costs more than the work."""
    names = options.among(("ours", "eager", "ours, graph"))
    image, latent = (QUICK_IMAGES, QUICK_LATENTS) if options.quick else ((64, 1, 28, 28), (128, 32))
    cases = {
        "masked gaussian": image,
        "mixture gaussian": image,
        "gaussian_kl": latent,
        "sample_gaussian": latent,
    }
    return [_comparison(options.plan(*case), names, options) for case in cases.items()]


SECTIONS: dict[str, Callable[[Options], list[Job]]] = {
    "ops": ops,
    "step": step,
    "determinism": cost_of_determinism,
    "threads": scaling,
    "growth": growth,
    "bandwidth": bandwidth,
    "peers": peers,
    "small": small,
}
# What is run where nothing is asked for: the others show parts of it.
DEFAULT = ("ops", "step", "determinism", "threads", "growth")
