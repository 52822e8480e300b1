"""What every test can ask for."""

import pytest
import torch

import fgbg_cuda

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
