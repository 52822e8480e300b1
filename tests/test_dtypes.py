"""Storage types: half precision is the float32 answer rounded, mixed inputs promote, masks of bool and
uint8 are read as such, autocast changes nothing."""

import pytest
import torch
from compare import assert_close, assert_rounded, assert_same, assert_same_of_any_kernel, gradients
from samples import SAMPLES, each

import fgbg_cuda
from fgbg_cuda import reference

HALVES = (torch.bfloat16, torch.float16)


def _widened(inputs):
    return {
        n: t.detach().float().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for n, t in inputs.items()
    }


def _gradients_of_sum(outputs, inputs):
    """With an upstream gradient of 1, which every type holds."""
    live = [o for o in outputs if o.requires_grad]
    names = [n for n, t in inputs.items() if t.requires_grad]
    ones = [torch.ones_like(o) for o in live]
    return dict(zip(names, torch.autograd.grad(live, [inputs[n] for n in names], ones), strict=True))


def _assert_float32_rounded(sample, inputs):
    """Values and gradients of half inputs are those of the same numbers in float32, which are finite:
    z and gradients rounded to the half type (or its infinity), losses in float32."""
    wide = _widened(inputs)
    actual, exact = sample(inputs), sample(wide)
    for k, (a, e) in enumerate(zip(actual, exact, strict=True)):
        assert e.isfinite().all()
        if k == 0 and sample.op in ("reparameterize", "sample_gaussian"):
            assert a.dtype == inputs["mu"].dtype
            assert_rounded(a, e, "z")
        else:
            assert a.dtype == torch.float32
            assert_close(a, e)
    actual, exact = _gradients_of_sum(actual, inputs), _gradients_of_sum(exact, wide)
    for name, half in actual.items():
        assert half.dtype == inputs[name].dtype
        assert exact[name].isfinite().all(), name
        assert_rounded(half, exact[name], name)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@each()
def test_half_is_float32_rounded(sample, device, dtype):
    _assert_float32_rounded(sample, sample.inputs(device, dtype, grad=True))


# Numbers on which half precision fails when it computes in itself: e^20 overflows float16, so do squares
# of residuals of many sigma, and 1 - sigmoid(30) is 0 in anything but its own formula.
EXTREMES = {
    "logvar": (-20.0, 20.0, -9.5),
    "prior_logvar": (8.0, -8.0, 0.0),
    "mu": (200.0, -200.0, 0.5),
    "prior_mu": (-200.0, 100.0, 0.25),
    "z": (200.0, -100.0, 0.5),
    "logits": (30.0, -30.0, 25.0),
    "prior_logits": (-30.0, 30.0, -25.0),
    "mask_logits": (30.0, -30.0, 12.0),
    "mask": (1.0, 0.0, 0.5),
    "fg": (40.0, -300.0, 0.125),
    "bg": (-300.0, 40.0, 30.0),
}


# Whose squares and reciprocals overflow float16 or underflow.
STD_EXTREMES = {"logvar": (400.0, 2.0**-12, 1.0), "prior_logvar": (2.0**-8, 300.0, 1.0)}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@each([s for s in SAMPLES if s.smooth])
def test_saturated_half(sample, device, dtype):
    """Finite, and what float32 gives; where float32 overflows the half type, its infinity."""
    inputs = sample.inputs(device, dtype, grad=True)
    with torch.no_grad():
        of_std = STD_EXTREMES if sample.options.get("parameterization") == "std" else {}
        for name, values in {**EXTREMES, **of_std}.items():
            if name in inputs and inputs[name].is_floating_point():
                for k, value in enumerate(values):
                    inputs[name].flatten()[k::3] = value
    _assert_float32_rounded(sample, inputs)


MIXES = [
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32, torch.float16),
    (torch.float16, torch.float32, torch.float64),
]


@pytest.mark.parametrize("dtypes", MIXES, ids=lambda d: "+".join(str(x)[6:] for x in d))
@each()
def test_mixed_inputs(sample, device, dtypes):
    """Each input may have its own type: computed in float64 if any is, else in float32; each gradient
    has the type of its input."""
    inputs = sample.inputs(device, dtypes, grad=True)
    compute = reference.compute_dtype(*inputs.values())
    actual, expected = sample(inputs), sample.expected(inputs)
    for k, (a, e) in enumerate(zip(actual, expected, strict=True)):
        is_draw = k == 0 and sample.op in ("reparameterize", "sample_gaussian")
        promoted = torch.promote_types(*(inputs[n].dtype for n in ("mu", "logvar"))) if is_draw else compute
        assert a.dtype == promoted
        assert_close(a, e, a.dtype)
    actual, expected = gradients(actual, inputs), gradients(expected, inputs)
    for name, gradient in actual.items():
        assert gradient.dtype == inputs[name].dtype
        # The cotangents are rounded to the type of z, the gradient to that of its input.
        lowest = max((t.dtype for t in inputs.values() if t.is_floating_point()), key=_eps)
        assert_close(gradient, expected[name], lowest, note=name)


def _eps(dtype):
    return torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_integer_masks_are_read_as_0_and_1(dtype, channels, device):
    fg, bg, target = torch.rand(3, 2, 3, 4, 5, device=device)
    mask = torch.randint(2, (2, channels, 4, 5), device=device)
    expected = fgbg_cuda.masked_reconstruction_loss(fg, bg, target, mask=mask.float())
    found = fgbg_cuda.masked_reconstruction_loss(fg, bg, target, mask=mask.to(dtype))
    assert_same_of_any_kernel(found, expected)
    if dtype == torch.uint8:
        # Any non-zero byte is "on": masks are often stored as 0 and 255.
        mask = mask.to(dtype) * 255
        assert_same(fgbg_cuda.masked_reconstruction_loss(fg, bg, target, mask=mask), found)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@each([s for s in SAMPLES if s.smooth][::5])
def test_autocast_changes_nothing(sample, device, dtype):
    """The ops choose their own precision: what autocast hands them is computed as without it."""
    inputs = sample.inputs(device, (torch.float32, dtype), grad=True)
    plain = sample(inputs)
    with torch.autocast(device.type, dtype=dtype):
        cast = sample(inputs)
    for a, b in zip(cast, plain, strict=True):
        assert a.dtype == b.dtype
        assert_same(a, b)
    first, second = gradients(cast, inputs), gradients(plain, inputs)
    for name, gradient in first.items():
        assert_same(gradient, second[name], name)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_training_step_under_autocast(dtype, device):
    """A layer that autocast makes half, then the loss: finite gradients at the parameters."""
    layer = torch.nn.Linear(16, 12).to(device)
    x = torch.rand(4, 16, device=device)
    with torch.autocast(device.type, dtype=dtype):
        out = layer(x)
        assert out.dtype == dtype
        fg, bg, mask_logits = out.view(4, 3, 4).unbind(1)
        loss = fgbg_cuda.mixture_reconstruction_loss(
            fg[:, None], bg[:, None], x.view(4, 4, 4)[:, :1], mask_logits=30 * mask_logits[:, None]
        )
    assert loss.dtype == torch.float32
    loss.backward()
    assert layer.weight.grad.isfinite().all()
    assert layer.weight.grad.abs().sum() > 0
