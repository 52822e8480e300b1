"""Every row of docs/adopting.md: what a codebase has and what it would write are the same number."""

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from torch.distributions import Categorical, Normal, Poisson, kl_divergence

import fgbg_cuda

DOC = Path(__file__).parents[1] / "docs" / "adopting.md"
ROWS = re.findall(r"^\| `(.+)` \| `(.+)` \|$", DOC.read_text(), re.MULTILINE)


def _tensors():
    """What the rows name."""
    generator = torch.Generator().manual_seed(5)

    def real(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def unit(*shape):
        return 0.05 + 0.9 * torch.rand(shape, generator=generator, dtype=torch.float64)

    latents = {"mu": real(4, 6), "logvar": real(4, 6), "raw": real(4, 6), "log_std": 0.5 * real(4, 6)}
    latents |= {"std": unit(4, 6) + 0.2, "var": unit(4, 6), "prior_mu": real(6), "prior_std": unit(6) + 0.2}
    latents["moments"] = real(2, 6, 3, 3)
    latents["mean"], latents["log_var"] = latents["moments"].chunk(2, dim=1)
    latents |= {"z": real(3, 4, 6), "log_p": real(5, 2), "log_q": real(5, 2)}
    latents |= {"q": unit(2, 1, 4, 4), "p": unit(2, 1, 4, 4)}
    latents |= {"classes": real(3, 4, 5), "prior_classes": real(3, 4, 5)}
    images = {"x": real(2, 3, 4, 5), "t": unit(2, 3, 4, 5), "sigma": unit(2, 3, 4, 5)}
    images |= {"fg": real(2, 3, 4, 5), "bg": real(2, 3, 4, 5), "alpha": unit(2, 1, 4, 5)}
    images |= {"counts": (6 * unit(2, 3, 4, 5)).round(), "valid": unit(2, 1, 4, 5) > 0.4}
    images |= {"video": real(2, 3, 2, 4, 4), "clip": real(2, 3, 2, 4, 4)}
    slots = {"slots": real(2, 4, 3, 4, 5), "masks": real(2, 4, 1, 4, 5)}
    slots["log_m"] = slots["masks"].log_softmax(1)
    return latents | images | slots


def test_there_are_rows():
    assert len(ROWS) >= 30


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1][:60])
def test_row(row, device):
    leaves = {n: t.to(device) for n, t in _tensors().items()}
    for t in leaves.values():
        if t.is_floating_point():
            t.requires_grad_()
    names = {"torch": torch, "F": F, "math": math, "Normal": Normal, "Poisson": Poisson}
    names |= {"Categorical": Categorical, "kl_divergence": kl_divergence}
    names |= {n: getattr(fgbg_cuda, n) for n in fgbg_cuda.functional.__all__}
    names["eps"] = fgbg_cuda.philox_normal(0, (4, 6), dtype=torch.float64, device=device)
    have, write = (eval(line, names | leaves) for line in row)
    assert_close(write, have)
    if not write.requires_grad:  # responsibilities are for looking at
        return
    used = [t for n, t in leaves.items() if t.requires_grad and re.search(rf"\b{n}\b", row[1])]
    weights = torch.linspace(0.5, 1.5, have.numel(), device=device, dtype=have.dtype).reshape(have.shape)
    pairs = [torch.autograd.grad((weights * v).sum(), used, allow_unused=True) for v in (have, write)]
    for theirs, ours in zip(*pairs, strict=True):
        if theirs is not None:
            assert_close(ours, theirs)
