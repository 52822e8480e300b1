"""The short way of ordinary calls (csrc/ordinary.cpp): the results of the long way, for no other calls."""

import pytest
import torch
from conftest import without_short_way
from torch.overrides import TorchFunctionMode

import fgbg_cuda
from fgbg_cuda import functional


def latents(**changes):
    torch.manual_seed(1)
    return {"mu": torch.randn(6, 5), "logvar": torch.randn(6, 5)} | changes


def images(mask="mask_logits", **changes):
    torch.manual_seed(1)
    fg, bg, target = (torch.rand(2, 3, 4, 5) for _ in range(3))
    made = torch.randn(2, 1, 4, 5) if mask == "mask_logits" else torch.rand(2, 1, 4, 5) > 0.5
    return {"fg": fg, "bg": bg, "target": target, mask: made} | changes


PRIOR = {"prior_mu": torch.rand(6, 5), "prior_logvar": torch.rand(6, 5)}
ORDINARY = [
    ("philox_normal", {"seed": 3, "size": (4, 5)}),
    ("philox_normal", {"seed": torch.tensor(3), "size": (0,), "offset": 7, "dtype": torch.bfloat16}),
    ("philox_normal", {"seed": 3, "size": (2, 3), "device": "cpu"}),
    ("philox_normal", {"seed": 3, "size": (), "device": torch.device("cpu")}),
    ("reparameterize", latents()),
    ("reparameterize", latents(num_samples=3, seed=2, offset=4)),
    ("gaussian_kl", latents()),
    ("gaussian_kl", latents(reduction="sample", **PRIOR)),
    ("sample_gaussian", latents()),
    ("sample_gaussian", latents(seed=torch.tensor([2]), num_samples=2, reduction="mean", **PRIOR)),
    ("masked_reconstruction_loss", images()),
    ("masked_reconstruction_loss", images("mask", likelihood="laplace", fg_scale=0.3, reduction="sum")),
    ("masked_reconstruction_loss", images(bg=None, likelihood="bernoulli", fg_weight=0.5)),
    ("blended_reconstruction_loss", images(scale=0.2, reduction="sample")),
    ("mixture_reconstruction_loss", images(likelihood="squared_error")),
    ("mixture_reconstruction_loss", images(channels="independent", bg_scale=0.3)),
]


def run(name, arguments):
    """The results of a call, with the noise of one seed, and their gradients."""
    arguments = {
        n: v.clone().requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for n, v in arguments.items()
    }
    torch.manual_seed(5)
    results = getattr(fgbg_cuda, name)(**arguments)
    results = results if isinstance(results, tuple) else (results,)
    inputs = [v for v in arguments.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    sums = [r.double().sum() for r in results if r.requires_grad]
    return [*results, *(torch.autograd.grad(sums, inputs) if inputs else ())]


@pytest.mark.parametrize(("name", "arguments"), ORDINARY)
def test_both_ways_give_the_same_bits(name, arguments, monkeypatch):
    short = run(name, arguments)
    without_short_way(monkeypatch)
    for a, b in zip(short, run(name, arguments), strict=True):
        assert torch.equal(a, b)
        assert (a.dtype, a.stride()) == (b.dtype, b.stride())


@pytest.mark.parametrize(("name", "arguments"), ORDINARY)
def test_ordinary_calls_take_the_short_way(name, arguments, monkeypatch):
    monkeypatch.setattr(functional, "_op", None)
    run(name, arguments)


class Subclass(torch.Tensor):
    pass


class Mode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


# What is right and goes the long way: its options are rare, or Python has to know of the call.
RARE = [
    ("philox_normal", {"seed": 3, "size": [4, 5]}),
    ("philox_normal", {"seed": 3, "size": (2,), "device": "cpu:0"}),
    ("reparameterize", latents(generator=torch.Generator().manual_seed(1))),
    ("reparameterize", latents(mu=torch.rand(2, 1, 1, 1, 1, 3), logvar=torch.rand(2, 1, 1, 1, 1, 3))),
    ("gaussian_kl", latents(reduction="none")),
    ("gaussian_kl", latents(free_bits=0.1)),
    ("gaussian_kl", latents(mu=torch.rand(6, 5).as_subclass(Subclass))),
    ("sample_gaussian", latents(free_bits=1)),
    ("masked_reconstruction_loss", images(normalize="area")),
    ("masked_reconstruction_loss", images(return_terms=True)),
    ("masked_reconstruction_loss", images(fg_scale=torch.tensor(0.5))),
    ("blended_reconstruction_loss", images(reduction="none")),
    ("mixture_reconstruction_loss", images(fg_scale=1)),
]


@pytest.mark.parametrize(("name", "arguments"), RARE)
def test_rare_calls_take_the_long_way(name, arguments, monkeypatch):
    calls = []
    original = functional._op
    monkeypatch.setattr(functional, "_op", lambda *args: calls.append(args) or original(*args))
    getattr(fgbg_cuda, name)(**arguments)
    assert calls


@pytest.mark.parametrize(
    "disturbance", [Mode, torch.autograd.forward_ad.dual_level, lambda: torch.device("cpu")]
)
@pytest.mark.parametrize(("name", "arguments"), ORDINARY)
def test_what_looks_at_calls_sees_them(name, arguments, disturbance, monkeypatch):
    calls = []
    original = functional._op
    monkeypatch.setattr(functional, "_op", lambda *args: calls.append(args) or original(*args))
    with disturbance():
        getattr(fgbg_cuda, name)(**arguments)
    assert calls
