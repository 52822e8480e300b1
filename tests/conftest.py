"""What every test can ask for."""

import sys
import zlib

import compare
import pytest
import torch

import fgbg_cuda

HAS_CUDA = torch.cuda.is_available() and fgbg_cuda.build_info()["cuda"] is not None


def pytest_addoption(parser):
    parser.addoption(
        "--devices",
        default="cpu,cuda" if HAS_CUDA else "cpu",
        help="where the tests of the ops run, by commas: cpu, cuda, or emulated (CUDA kernels on the CPU, "
        "see tests/emulation). Without cpu, tests that say nothing about the others are left out.",
    )


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        names = metafunc.config.getoption("devices").split(",")
        metafunc.parametrize("device", names, indirect=True, scope="function")


def pytest_collection_modifyitems(config, items):
    devices = config.getoption("devices").split(",")

    def says_something(item):
        if item.get_closest_marker("of_the_emulation"):
            return "emulated" in devices
        if "cpu" in devices:
            return True
        if "cuda" in devices and item.get_closest_marker("gpu"):
            return True
        return hasattr(item, "callspec") and "device" in item.callspec.params

    dropped = [item for item in items if not says_something(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if says_something(item)]


@pytest.fixture
def device(request):
    """Every device that has kernels, or whose kernels are emulated: their tensors are on the CPU."""
    compare.kernels = request.param
    try:
        if request.param != "emulated":
            yield torch.device(request.param)
            return
        if marker := request.node.get_closest_marker("not_emulated"):
            pytest.skip(marker.args[0])
        if sys.platform != "linux":
            pytest.skip("the emulation is written for Linux")
        import emulation

        kernels = emulation.load()
        with kernels.running(seed=zlib.crc32(request.node.nodeid.encode())):
            yield torch.device("cpu")
        assert kernels.spoilt() == 0, "a tensor was written to outside its bounds"
    finally:
        compare.kernels = "cpu"


@pytest.fixture
def threads():
    """Sets the number of CPU threads; the old number comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
