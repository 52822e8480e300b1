"""Reduced losses write their gradients in the forward pass, for an upstream gradient of one, and backward
multiplies these by the one that arrives. Whatever backward is asked for, the numbers must be those of the
backward op, which computes them anew; it is taken where the graph of the derivative is wanted too."""

import pytest
import torch
from benchmarks.memory import peak_bytes
from compare import assert_close, assert_rounded, assert_same
from samples import SAMPLES, each

import fgbg_cuda

REDUCED = [
    s
    for s in SAMPLES
    if s.op not in ("reparameterize", "sample_gaussian") and s.options.get("reduction") != "none"
]


def _loss(outputs):
    """The loss alone, weighted where it is one per sample: some of them, not all, arrive with a one."""
    loss = outputs[0]
    if loss.dim() == 0:
        return loss
    weights = torch.arange(loss.numel(), device=loss.device).view(loss.shape) % 2 + 1
    return (loss * weights).sum()


def _gradients(loss, inputs, **options):
    wanted = {n: t for n, t in inputs.items() if t.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(loss, wanted.values(), **options), strict=True))


def _writes_gradients(sample):
    """Not where a floor comes after the op, nor where the gradient of a scale or of what is broadcast sums
    what arrives at samples. (Kernels index five dimensions; of more, broadcasting comes before the op.)"""
    scales = any(name.endswith("scale") for name in sample.tensors)
    shapes = [make.shape for make in sample.tensors.values()]
    latents = "target" not in sample.tensors
    n = sample.options.get("batch_dims", 1)
    shared = latents and any(len(s) < len(shapes[0]) or s[:n] != shapes[0][:n] for s in shapes)
    broadcast = latents and any(s != shapes[0] for s in shapes)
    by_sample = (scales or shared) and sample.options.get("reduction") == "sample"
    return "free_bits" not in sample.options and not by_sample and not (broadcast and len(shapes[0]) > 5)


def _recomputed(loss, inputs, **options):
    return {n: g.detach() for n, g in _gradients(loss, inputs, create_graph=True, **options).items()}


@pytest.mark.parametrize("upstream", [1.0, 0.0, -3.5, float("inf"), float("nan")])
@each([s for s in REDUCED if _writes_gradients(s)])
def test_linear_in_the_upstream_gradient(sample, upstream, device):
    """The gradient for one, times what arrives: bit for bit, infinities and NaN too."""
    inputs = sample.inputs(device, torch.float32, grad=True)
    loss = sample(inputs)[0].sum()
    ones = _gradients(loss, inputs, retain_graph=True)
    if sample.options.get("normalize") == "area" or upstream == 1.0:
        expected = _recomputed(loss, inputs, grad_outputs=loss.new_tensor(upstream))
    else:
        expected = {n: g * upstream for n, g in ones.items()}
    for name, gradient in _gradients(loss, inputs, grad_outputs=loss.new_tensor(upstream)).items():
        assert_same(gradient, expected[name], name)


@pytest.mark.parametrize("upstream", [1.0, -3.5, 1e-3])
@each(REDUCED)
def test_the_numbers_of_the_backward_op(sample, upstream, device):
    """One rounding more than where the gradients are computed for what arrives; so one of each term."""
    inputs = sample.inputs(device, torch.float32, grad=True)
    loss = _loss(sample(inputs))
    arriving = torch.tensor(upstream, device=device, dtype=loss.dtype)
    expected = _recomputed(loss, inputs, grad_outputs=arriving)
    for name, gradient in _gradients(loss, inputs, grad_outputs=arriving).items():
        assert_close(gradient / upstream, expected[name] / upstream, operations=4, note=name)


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
def test_inputs_that_need_no_gradient_get_none(sample, device):
    """Each input in turn is the only one that wants a gradient."""
    everything = sample.inputs(device, torch.float32, grad=True)
    expected = _gradients(_loss(sample(everything)), everything)
    for name in expected:
        inputs = {n: t.detach().requires_grad_(n == name) for n, t in everything.items()}
        _loss(sample(inputs)).backward()
        # Which way a loss takes may depend on what is wanted of it: a learned scale's gradient sums samples.
        assert_close(inputs[name].grad, expected[name], operations=4, note=name)
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


@pytest.mark.not_emulated("its memory is not counted")
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_peak_memory_is_the_gradients(weight, device):
    """Beside them, a few numbers per segment. No second set of gradients if the upstream is not one."""
    inputs = _images(device)
    gradients = sum(t.nbytes for t in inputs if t.requires_grad)
    found = peak_bytes(_step(lambda *i: weight * _fused(*i), inputs), str(device))
    assert gradients <= found <= 1.02 * gradients
    assert found < peak_bytes(_step(lambda *i: weight * _by_hand(*i), inputs), str(device))


@pytest.mark.not_emulated("its memory is not counted")
def test_no_gradient_no_memory(device):
    inputs = [t.detach() for t in _images(device)]
    with torch.no_grad():
        found = peak_bytes(lambda: _fused(*inputs), str(device))
    assert found <= 0.02 * sum(t.nbytes for t in inputs)
