"""Reduced losses write their gradients in the forward pass, for an upstream gradient of one, and backward
hands these over. Whatever backward is asked for, the numbers must be those of the plain way, forward op and
backward op, which is taken where the dispatcher's ops are called."""

import pytest
import torch
from benchmarks.memory import peak_bytes
from compare import assert_close, assert_rounded, assert_same, expect_ones
from samples import SAMPLES, each
from torch.utils.checkpoint import checkpoint

import fgbg_cuda

REDUCED = [
    s
    for s in SAMPLES
    if s.op not in ("reparameterize", "sample_gaussian") and s.options.get("reduction") != "none"
]


@pytest.fixture(autouse=True)
def _habit():
    expect_ones()


def _loss(outputs):
    """The loss alone, weighted where it is one per sample: some of them, not all, arrive with a one."""
    loss = outputs[0]
    if loss.dim() == 0:
        return loss
    return (loss * (torch.arange(len(loss), device=loss.device) % 2 + 1)).sum()


def _gradients(loss, inputs, **options):
    wanted = {n: t for n, t in inputs.items() if t.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(loss, wanted.values(), **options), strict=True))


@pytest.mark.parametrize("upstream", [1.0, 0.0, -3.5, float("inf"), float("nan")])
@each(REDUCED)
def test_same_bits_as_the_plain_way(sample, upstream, device, plainly):
    inputs = sample.inputs(device, torch.float32, grad=True)
    loss = _loss(sample(inputs))
    plain = _loss(plainly(sample, inputs))
    assert_same(loss, plain)
    arriving = torch.tensor(upstream, device=device, dtype=loss.dtype)
    expected = _gradients(plain, inputs, grad_outputs=arriving)
    for name, gradient in _gradients(loss, inputs, grad_outputs=arriving).items():
        assert_same(gradient, expected[name], name)


@each(REDUCED)
def test_a_graph_that_is_kept_gives_the_same_again(sample, device):
    """Even if the caller writes into the gradients that the first pass gave."""
    inputs = sample.inputs(device, torch.float32, grad=True)
    loss = _loss(sample(inputs))
    first = _gradients(loss, inputs, retain_graph=True)
    expected = {n: g.clone() for n, g in first.items()}
    for gradient in first.values():
        gradient.fill_(7)
    double = torch.tensor(2.0, device=device, dtype=loss.dtype)
    for gradient in _gradients(loss, inputs, retain_graph=True, grad_outputs=double).values():
        gradient.fill_(7)
    for name, gradient in _gradients(loss, inputs).items():
        assert_same(gradient, expected[name], name)
    with pytest.raises(RuntimeError, match="a second time"):
        _gradients(loss, inputs)


@each(REDUCED)
def test_second_derivatives(sample, device, plainly):
    inputs = sample.inputs(device, grad=True)
    results = []
    for call in (sample, lambda i: plainly(sample, i)):
        first = _gradients(_loss(call(inputs)), inputs, create_graph=True)
        of = sum(g.square().sum() for g in first.values() if g.requires_grad)
        results.append(_gradients(of, inputs, allow_unused=True))
    for name, gradient in results[0].items():
        if gradient is not None:
            assert_same(gradient, results[1][name], name)


@each(REDUCED)
def test_inputs_that_need_no_gradient_get_none(sample, device):
    """Each input in turn is the only one that wants a gradient."""
    everything = sample.inputs(device, torch.float32, grad=True)
    expected = _gradients(_loss(sample(everything)), everything)
    for name in expected:
        inputs = {n: t.detach().requires_grad_(n == name) for n, t in everything.items()}
        _loss(sample(inputs)).backward()
        assert_same(inputs[name].grad, expected[name], name)
        assert all(t.grad is None for n, t in inputs.items() if n != name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each(REDUCED[::3])
def test_loss_scaling_keeps_its_range(sample, dtype, device):
    """A scaled loss is there so that small gradients survive in half precision: they must not be rounded,
    or flushed to zero, before they are scaled."""
    inputs = sample.inputs(device, dtype, grad=True)
    factor = 2.0**-20
    inputs_wide = {n: t.detach().double() if t.is_floating_point() else t for n, t in inputs.items()}
    inputs_wide = {n: t.requires_grad_(inputs[n].requires_grad) for n, t in inputs_wide.items()}
    loss, again = _loss(sample(inputs)), _loss(sample(inputs))
    exact = _loss(sample.expected(inputs_wide))
    small = torch.tensor(factor, device=device, dtype=loss.dtype)
    expected = _gradients(exact, inputs_wide, grad_outputs=small.double())
    for name, gradient in _gradients(loss, inputs, grad_outputs=small).items():
        assert_rounded(gradient.cpu(), expected[name].cpu(), name)
    large = torch.tensor(2.0**20, device=device, dtype=torch.float32)
    for name, gradient in _gradients(again.float() * factor, inputs, grad_outputs=large).items():
        assert_rounded(gradient.cpu(), (expected[name] / factor).cpu(), name)


@each(REDUCED[::4])
def test_checkpointing_and_offloading(sample, device):
    """Saved gradients pass through the hooks of saved tensors like any other saved tensor."""
    inputs = sample.inputs(device, torch.float32, grad=True)
    expected = _gradients(_loss(sample(inputs)), inputs)
    with torch.autograd.graph.save_on_cpu():
        offloaded = _loss(sample(inputs))
    again = _loss(checkpoint(lambda: sample(inputs), use_reentrant=False))
    expect_ones()
    for loss in (offloaded, again):
        for name, gradient in _gradients(loss, inputs).items():
            assert_same(gradient, expected[name], name)


def test_leaf_gradients_accumulate(device):
    x, y = (torch.randn(3, 4, device=device, requires_grad=True) for _ in range(2))
    for _ in range(3):
        (
            fgbg_cuda.gaussian_kl(x, y, reduction="sum") + fgbg_cuda.gaussian_kl(x, y, reduction="sum")
        ).backward()
    assert_close(x.grad, 6 * x)


def test_an_input_changed_before_backward_is_noticed(device):
    x, y = (torch.randn(3, 4, device=device, requires_grad=True) for _ in range(2))
    loss = fgbg_cuda.gaussian_kl(x, y)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


IMAGES = (16, 3, 64, 64)


def _step(function, inputs):
    return lambda: torch.autograd.grad(function(*inputs), [t for t in inputs if t.requires_grad])


def _images(device):
    fg, bg = (torch.rand(IMAGES, device=device, requires_grad=True) for _ in range(2))
    logits = torch.randn(16, 1, 64, 64, device=device, requires_grad=True)
    return [fg, bg, logits, torch.rand(IMAGES, device=device)]


def _fused(fg, bg, logits, target):
    return fgbg_cuda.masked_reconstruction_loss(
        fg, bg, target, mask_logits=logits, likelihood="squared_error", reduction="sum"
    )


def _by_hand(fg, bg, logits, target):
    mask = torch.sigmoid(logits)
    return (mask * (fg - target) ** 2 + (1 - mask) * (bg - target) ** 2).sum()


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("expected", [1.0, 0.5])
def test_peak_memory_is_the_gradients(weight, expected, device):
    """Beside them, a few numbers per segment. No second set of gradients if the upstream is not one, whether
    or not that was to be expected."""
    inputs = _images(device)
    gradients = sum(t.nbytes for t in inputs if t.requires_grad)
    (expected * _fused(*inputs)).backward(inputs=inputs[:1])
    inputs[0].grad = None
    found = peak_bytes(_step(lambda *i: weight * _fused(*i), inputs), str(device))
    assert gradients <= found <= 1.02 * gradients
    assert found < peak_bytes(_step(lambda *i: weight * _by_hand(*i), inputs), str(device))


def test_a_scaled_loss_takes_the_plain_way_after_the_first_step(device):
    """The forward pass keeps no gradients of a loss that is scaled anyway."""
    inputs = _images(device)
    gradients = sum(t.nbytes for t in inputs if t.requires_grad)

    def kept():
        losses = []
        peak = peak_bytes(lambda: losses.append(_fused(*inputs)), str(device))
        (0.5 * losses[0]).backward()
        return peak

    first, second = kept(), kept()
    assert first >= gradients
    if device.type == "cpu":
        assert second <= 0.02 * gradients
    _fused(*inputs).backward()
    assert kept() >= gradients


def test_no_gradient_no_memory(device):
    inputs = [t.detach() for t in _images(device)]
    with torch.no_grad():
        found = peak_bytes(lambda: _fused(*inputs), str(device))
    assert found <= 0.02 * sum(t.nbytes for t in inputs)
