"""What only a GPU can show: streams, several devices, and sizes beyond 2^31. (Everything else runs on CUDA
through the `device` fixture of the other tests.)"""

from __future__ import annotations

import pytest
import torch
from compare import assert_close

import fgbg_cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or fgbg_cuda.build_info()["cuda"] is None, reason="needs a GPU"
    ),
]


def _loss(device: torch.device | str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    fg, bg, target, logits = torch.rand(4, 3, 1, 40, 40, generator=generator).to(device)
    mu, logvar = torch.randn(2, 3, 24, generator=generator).to(device)
    z, kl = fgbg_cuda.sample_gaussian(mu, logvar, seed=5)
    return fgbg_cuda.mixture_reconstruction_loss(fg, bg, target, mask_logits=logits) + kl + z.sum()


@pytest.mark.parametrize("offset", [0, 1, 2**34 + 3])
def test_noise_is_the_same_on_both_devices(offset: int):
    """A single differing random bit would move a normal by far more than the 2e-6 that the two
    implementations of log, sin and cos may differ by."""
    cpu, cuda = (fgbg_cuda.philox_normal(3, (100_003,), offset=offset, device=d) for d in ("cpu", "cuda"))
    assert (cpu - cuda.cpu()).abs().max() < 2e-6


def test_work_goes_to_the_current_stream():
    """On a stream that is still busy making the inputs, the kernels must wait for them."""
    expected = _loss("cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        source = torch.rand(3, 1, 512, 512, device="cuda")
        torch.cuda._sleep(50_000_000)
        late = source * 2
        loss = fgbg_cuda.blended_reconstruction_loss(late, late, source * 0, mask=late[:, :1] * 0 + 0.5)
    stream.synchronize()
    plain = fgbg_cuda.blended_reconstruction_loss(late, late, source * 0, mask=late[:, :1] * 0 + 0.5)
    assert torch.equal(loss, plain)
    assert torch.equal(_loss("cuda"), expected)


def test_streams_count_their_blocks_apart():
    """Losses on several streams at once, and a graph that is replayed beside them: the same as alone."""
    images = torch.rand(3, 16, 3, 128, 128, device="cuda")

    def losses() -> list[torch.Tensor]:
        return [
            fgbg_cuda.masked_reconstruction_loss(*images, mask=images[k][:, :1], likelihood="laplace")
            for k in range(3)
        ]

    expected = losses()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = losses()
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    found = []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(losses())
        graph.replay()
    torch.cuda.synchronize()
    for result in (*found, captured):
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_work_goes_to_the_device_of_the_tensors():
    """Whichever device is current."""
    with torch.cuda.device(0):
        second = _loss("cuda:1")
    assert second.device == torch.device("cuda:1")
    assert_close(second, _loss("cuda:0"), torch.float32)


def test_more_than_2_31_elements():
    """Indices beyond 32 bits, in real memory: 2^31 + 24 bfloat16 pixels in each of three images."""
    n = 2**31 + 24
    free, _ = torch.cuda.mem_get_info()
    if free < 10 * n:
        pytest.skip(f"needs {10 * n / 2**30:.0f} GiB of GPU memory")
    fg = torch.zeros(1, 1, n, dtype=torch.bfloat16, device="cuda")
    fg[0, 0, -1] = 3
    mask = torch.ones(1, 1, n, dtype=torch.uint8, device="cuda")
    target = torch.zeros((), dtype=torch.bfloat16, device="cuda").expand_as(fg)
    fg.requires_grad_()
    loss = fgbg_cuda.masked_reconstruction_loss(fg, None, target, mask=mask, likelihood="squared_error")
    assert loss.item() == 9
    (grad,) = torch.autograd.grad(loss, fg)
    assert grad[0, 0, -1] == 6
    assert grad[0, 0, :-1].count_nonzero() == 0
