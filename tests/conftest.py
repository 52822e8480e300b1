"""What every test can ask for."""

import types

import pytest
import torch

import fgbg_cuda
from fgbg_cuda import functional

DEVICES = ["cpu"]
if torch.cuda.is_available() and fgbg_cuda.build_info()["cuda"] is not None:
    DEVICES.append("cuda")


@pytest.fixture(params=DEVICES)
def device(request):
    """Every device that has kernels here."""
    return torch.device(request.param)


@pytest.fixture
def threads():
    """Sets the number of CPU threads; the old number comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def without_short_way(patch: pytest.MonkeyPatch) -> None:
    """Sends ordinary calls the way of all others: through ``functional._op``, where a test can intervene."""
    names = [name for name in vars(functional._ordinary) if name[0] != "_"]
    nothing = types.SimpleNamespace(**dict.fromkeys(names, lambda *args: None))
    patch.setattr(functional, "_ordinary", nothing)


@pytest.fixture
def plainly(monkeypatch):
    """Calls a sample through the dispatcher's ops, which know of no faster way."""

    def call(sample, inputs):
        with monkeypatch.context() as patch:
            without_short_way(patch)
            patch.setattr(functional, "_op", lambda name, device: getattr(torch.ops.fgbg, name).default)
            return sample(inputs)

    return call
