"""More than 2^31 elements.

A dense tensor of that size with its results takes tens of gigabytes, so each way in which an index can
overflow is tried with what it needs alone: a loop over more than 2^31 logical elements (of a tensor with
stride 0, which takes no memory), memory offsets beyond 2^31 elements (of a view into an allocation of
which only a few pages are touched), and noise numbers beyond 2^31 (test_philox.py goes up to 2^63).
"""

import pytest
import torch
from compare import assert_close, assert_same

import fgbg_cuda

BEYOND = 2**31 + 4096


def _store(elements, dtype, device):
    """Uninitialised memory: on Linux, pages that are never touched are never taken."""
    try:
        return torch.empty(elements, dtype=dtype, device=device)
    except RuntimeError:
        pytest.skip("not enough memory")


@pytest.mark.parametrize("reduction", ["sample", "mean"])
def test_loop_over_more_than_2_31_elements(reduction, device):
    """The sum over rows of 2^31 and more elements is that of their number."""
    row = BEYOND if reduction == "sample" else BEYOND // 2
    mu = torch.tensor([[0.5], [1.5]], dtype=torch.bfloat16, device=device)[: 1 if row == BEYOND else 2]
    mu = mu.expand(-1, row)
    kl = fgbg_cuda.gaussian_kl(mu, torch.zeros_like(mu[:, :1]).expand_as(mu), reduction=reduction)
    expected = {"sample": [0.125 * row], "mean": (0.125 + 1.125) / 2}[reduction]
    assert_close(kl, torch.tensor(expected, device=device))


def _far_apart(small, stride):
    """A copy of `small` whose samples lie `stride` elements apart."""
    store = _store(stride * (small.shape[0] - 1) + small[0].numel(), small.dtype, small.device)
    view = store.as_strided(small.shape, (stride, *small.stride()[1:]))
    return view.copy_(small)


def test_latents_beyond_2_31_elements_in_memory(device):
    mu, logvar = torch.randn(2, 2, 700, device=device).bfloat16()
    far = _far_apart(mu, BEYOND)
    for op in (fgbg_cuda.reparameterize, fgbg_cuda.sample_gaussian):
        actual, expected = op(far, logvar, seed=1), op(mu, logvar, seed=1)
        for a, e in zip(actual, expected, strict=True):
            assert_same(a, e)


def test_masks_beyond_2_31_elements_in_memory(device):
    fg, bg, target = torch.rand(3, 2, 3, 20, 40, device=device)
    mask = torch.randint(2, (2, 3, 20, 40), device=device, dtype=torch.uint8)
    loss = fgbg_cuda.masked_reconstruction_loss(fg, bg, target, mask=_far_apart(mask, BEYOND))
    assert_same(loss, fgbg_cuda.masked_reconstruction_loss(fg, bg, target, mask=mask))


def test_channels_beyond_2_31_elements_in_memory(device):
    """The largest offset is in a dimension other than the first."""
    fg, bg, target = torch.rand(3, 1, 2, 20, 40, device=device)
    mask = torch.randint(2, (1, 2, 20, 40), device=device, dtype=torch.uint8)
    far = _far_apart(mask.transpose(0, 1), BEYOND).transpose(0, 1)
    loss = fgbg_cuda.masked_reconstruction_loss(fg, bg, target, mask=far)
    assert_same(loss, fgbg_cuda.masked_reconstruction_loss(fg, bg, target, mask=mask))


def test_gradient_from_beyond_2_31_elements_in_memory(device):
    mu = torch.randn(2, 700, device=device, dtype=torch.bfloat16, requires_grad=True)
    z = fgbg_cuda.reparameterize(mu, mu, seed=1)
    grad = torch.randn(2, 700, device=device).bfloat16()
    (far,) = torch.autograd.grad(z, mu, _far_apart(grad, BEYOND), retain_graph=True)
    (near,) = torch.autograd.grad(z, mu, grad)
    assert_same(far, near)


def test_draws_beyond_2_31_numbers_of_the_stream(device):
    """What the last draws of a stack of more than 2^31 numbers are made of."""
    mu, logvar = torch.zeros(2, 4, 8, device=device)
    far = fgbg_cuda.reparameterize(mu, logvar, seed=2, num_samples=3, offset=BEYOND - 40)
    for s in range(3):
        alone = fgbg_cuda.reparameterize(mu, logvar, seed=2, offset=BEYOND - 40 + 32 * s)
        assert_same(far[s], alone)
