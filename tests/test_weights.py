"""Weights of elements, maps of scales, and losses of one image: what they mean, next to the lines that they
replace."""

import math

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, assert_same, gradients

import fgbg_cuda
from fgbg_cuda import reference

POISON = (math.nan, math.inf, -math.inf)
SHAPE = (3, 2, 9, 20)
MASKS = ("mask", "mask_logits", "hard")


def _make(*shape, seed=0, low=0.2):
    generator = torch.Generator().manual_seed(seed)
    return low + torch.rand(shape, generator=generator, dtype=torch.float64)


def _calls():
    """(function, operands, the shape of a weight)."""
    x, y, t = (_make(*SHAPE, seed=k) for k in range(3))
    scale = _make(*SHAPE, seed=3)
    yield "plain", fgbg_cuda.reconstruction_loss, {"prediction": x, "target": t, "scale": scale}, SHAPE
    one = (SHAPE[0], 1, *SHAPE[2:])
    layers = {"fg": x, "bg": y, "target": t}
    for kind in MASKS:
        for channels in (1, SHAPE[1]):
            mask = _make(SHAPE[0], channels, *SHAPE[2:], seed=4, low=0.0)
            masks = {"hard": {"mask": mask > 0.5}}.get(kind, {kind: mask})
            both = {**layers, **masks, "fg_scale": scale}
            yield f"masked-{kind}-{channels}", fgbg_cuda.masked_reconstruction_loss, both, SHAPE
            both = {**layers, **masks, "scale": scale}
            yield f"blended-{kind}-{channels}", fgbg_cuda.blended_reconstruction_loss, both, SHAPE
    logits = {**layers, "mask_logits": _make(*one, seed=5), "bg_scale": scale}
    yield "joint", fgbg_cuda.mixture_reconstruction_loss, logits, one
    yield (
        "independent",
        lambda **k: fgbg_cuda.mixture_reconstruction_loss(channels="independent", **k),
        logits,
        SHAPE,
    )


CALLS = [pytest.param(*rest, id=name) for name, *rest in _calls()]


def _holes(shape):
    """A weight that is 0 in a third of the elements, and negative in another."""
    return (torch.arange(math.prod(shape)) % 7 % 3 - 1).reshape(shape).double() * 0.7


def _moved(operands, device, dtype):
    return {n: t.to(device, dtype if t.is_floating_point() else None) for n, t in operands.items()}


def _results(function, operands, **options):
    leaves = {n: t.detach().clone() for n, t in operands.items()}
    for t in leaves.values():
        t.requires_grad_(t.is_floating_point())
    outputs = function(**leaves, **options)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else (outputs[0], *outputs[1])
    return outputs, gradients(outputs, leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sample", "batchmean"])
@pytest.mark.parametrize(("function", "operands", "shape"), CALLS)
def test_where_a_weight_is_zero_nothing_else_counts(function, operands, shape, reduction, dtype, device):
    """NaN and infinities in every operand, the mask among them: the same loss, and no gradient there."""
    weight = _holes(shape)
    out = (weight == 0).expand(shape)
    clean = _moved({**operands, "weight": weight}, device, dtype)
    poisoned = dict(clean)
    for name, t in clean.items():
        if name == "weight" or not t.is_floating_point():
            continue
        where = out.to(device)
        if t.shape[1] < where.shape[1]:
            where = where.all(1, keepdim=True)
        pattern = torch.tensor(POISON, device=device, dtype=t.dtype)
        pattern = pattern[torch.arange(t.numel(), device=device) % 3].reshape(t.shape)
        poisoned[name] = torch.where(where.expand_as(t), pattern, t)
    (expected, *_), want = _results(function, clean, reduction=reduction)
    (actual, *_), found = _results(function, poisoned, reduction=reduction)
    assert expected.isfinite().all()
    assert_same(actual, expected)
    for name, gradient in found.items():
        assert_same(gradient, want[name], name)
        if name == "weight":
            assert not gradient[(weight == 0).to(device)].any()


@pytest.mark.parametrize(("function", "operands", "shape"), CALLS)
def test_weights_of_other_types_are_the_same_numbers(function, operands, shape, device):
    coins = (torch.arange(math.prod(shape)) % 3 > 0).reshape(shape)
    results = []
    for weight in (coins.double(), coins, coins.to(torch.uint8) * 5):
        results.append(function(**_moved({**operands, "weight": weight}, device, torch.float64)))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.mark.parametrize(("function", "operands", "shape"), CALLS)
def test_a_weight_multiplies(function, operands, shape, device):
    """Of a loss by element it is the factor; and half of everything is half of the sum."""
    call = _moved(operands, device, torch.float64)
    weight = _make(*shape, seed=6).to(device)
    elements = function(**call, reduction="none")
    assert_close(function(**call, weight=weight, reduction="none"), weight * elements)
    assert_close(function(**call, weight=weight, reduction="sum"), (weight * elements).sum())
    half = torch.full((), 0.5, device=device, dtype=torch.float64)
    assert_close(function(**call, weight=half), function(**call) / 2)


def test_an_area_is_that_of_valid_pixels(device):
    """Means over the pixels of each region that are valid."""
    x, y, t = (_make(*SHAPE, seed=k).to(device) for k in range(3))
    inside = _make(3, 1, 9, 20, seed=4, low=0.0).to(device) > 0.5
    valid = _make(3, 1, 9, 20, seed=7, low=0.0).to(device) > 0.3
    loss, terms = fgbg_cuda.masked_reconstruction_loss(
        x, y, t, mask=inside, weight=valid, likelihood="squared_error", normalize="area",
        reduction="sample", return_terms=True,
    )  # fmt: skip
    for b in range(3):
        fg, bg = ((m & valid)[b].expand(2, 9, 20) for m in (inside, ~inside))
        expected = F.mse_loss(x[b][fg], t[b][fg]) + F.mse_loss(y[b][bg], t[b][bg])
        assert_close(loss[b], expected)
        assert terms.fg_area[b] == (inside & valid)[b].sum()


@pytest.mark.parametrize(
    "shape", [(5,), (3, 7), (2, 3, 4), (2, 3, 4, 5), (2, 2, 3, 2, 2), (2, 2, 1, 2, 3, 2)]
)
def test_the_losses_that_torch_has(shape, device):
    x, t = _make(*shape, low=-0.5).to(device), _make(*shape, seed=1).to(device)
    loss = fgbg_cuda.reconstruction_loss
    count = (8 * t).round()
    for ours, theirs in (
        (loss(x, t, likelihood="squared_error", reduction="mean"), F.mse_loss(x, t)),
        (loss(x, t, likelihood="absolute_error", reduction="none"), F.l1_loss(x, t, reduction="none")),
        (loss(x, t - 0.2, likelihood="bernoulli"), _bce(x, t - 0.2) / shape[0]),
        (loss(x, count, likelihood="poisson"), -_log_prob(torch.distributions.Poisson(x.exp()), count)),
        (loss(x, t, scale=0.3), -_log_prob(torch.distributions.Normal(x, 0.3), t)),
        (loss(x, t, likelihood="laplace", scale=t), -_log_prob(torch.distributions.Laplace(x, t), t)),
    ):
        assert_close(ours, theirs)


def _bce(x, t):
    return F.binary_cross_entropy_with_logits(x, t, reduction="sum")


def _log_prob(distribution, value):
    return distribution.log_prob(value).sum() / value.shape[0]


def test_charbonnier(device):
    """As image restoration writes it, with eps for its scale."""
    x, t = _make(*SHAPE).to(device), _make(*SHAPE, seed=1).to(device)
    loss = fgbg_cuda.reconstruction_loss(x, t, likelihood="charbonnier", scale=1e-3, reduction="mean")
    assert_close(loss, torch.sqrt((x - t) ** 2 + 1e-3**2).mean())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_poisson_counts(dtype, device):
    """log n! from 0 on, where it is exact, over where the series begins, to where it is nearly n log n."""
    counts = torch.cat([torch.arange(40), torch.logspace(2, 7, 30).round()]).to(device, dtype)
    counts = counts[None].requires_grad_()
    rate = torch.zeros_like(counts, requires_grad=False)
    elements = fgbg_cuda.reconstruction_loss(rate, counts, likelihood="poisson", reduction="none") - 1
    wide = counts.detach().double()
    expected = torch.lgamma(wide + 1)
    error = (elements - expected).abs() / expected.clamp(min=16)  # the series' own terms are as large
    assert error.max() <= 4 * torch.finfo(dtype).eps
    assert not elements[0, :2].any()
    (slope,) = torch.autograd.grad(elements.sum(), counts)
    assert (
        (slope - torch.digamma(wide + 1)).abs() <= 8 * torch.finfo(dtype).eps * wide.clamp(min=2).log()
    ).all()


@pytest.mark.parametrize("reduction", ["sample", "none", "batchmean"])
def test_dimensions_of_samples(reduction, device):
    """A video, with a weight of each frame and a noise of each pixel, next to frames one by one."""
    video, target = _make(2, 3, 2, 4, 5).to(device), _make(2, 3, 2, 4, 5, seed=1).to(device)
    weight, scale = _make(2, 3, 1, 1, 1, seed=2).to(device), _make(4, 5, seed=3).to(device)
    loss = fgbg_cuda.reconstruction_loss(
        video, target, weight=weight, scale=scale, batch_dims=2, reduction=reduction
    )
    frames = torch.stack(
        [
            torch.stack(
                [
                    fgbg_cuda.reconstruction_loss(
                        video[b, t][None], target[b, t][None], weight=weight[b, t][None], scale=scale,
                        reduction=reduction,
                    )
                    for t in range(3)
                ]
            )
            for b in range(2)
        ]
    )  # fmt: skip
    if reduction == "batchmean":
        assert_close(loss, frames.mean())
    else:
        assert_close(loss, frames.reshape(loss.shape))


@pytest.mark.parametrize(("function", "operands", "shape"), CALLS)
def test_gradients_of_what_is_broadcast_have_the_same_bits_for_any_threads(function, operands, shape, device):
    """A weight and a scale that all samples share."""
    call = _moved({n: t for n, t in operands.items() if not n.endswith("scale")}, device, torch.float32)
    call["weight"] = _make(*shape[2:], seed=8).float().to(device)
    name = "scale" if function is fgbg_cuda.reconstruction_loss or "scale" in operands else "fg_scale"
    call[name] = _make(1, *shape[1:], seed=9).float().to(device)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(_results(function, call))
    torch.set_num_threads(2)
    for _, other in found[1:]:
        for n, gradient in found[0][1].items():
            assert_same(other[n], gradient, n)


def test_reference_is_the_specification_of_a_weighted_area(device):
    """Second derivatives come from it: the kernels' first ones are its own, with everything at once."""
    x, y, t, m = (_make(2, 2, 3, 4, seed=k).to(device) for k in range(4))
    w = _holes((2, 2, 3, 4)).abs().to(device)
    operands = {"fg": x, "bg": y, "target": t, "mask": m / 2, "weight": w}
    leaves = {n: v.requires_grad_() for n, v in operands.items()}
    ours = fgbg_cuda.masked_reconstruction_loss(**leaves, normalize="area")
    theirs = reference.reconstruction_loss(
        leaves["fg"], leaves["bg"], leaves["target"], leaves["mask"], 1.0, 1.0, leaves["weight"], "masked",
        False, "gaussian", normalize_area=True,
    )[0]  # fmt: skip
    assert_close(ours, theirs)
    want = gradients([theirs], leaves)
    for name, gradient in gradients([ours], leaves).items():
        assert_close(gradient, want[name], note=name)


@pytest.mark.parametrize("reduction", ["batchmean", "sample"])
def test_every_operand_at_once(reduction, device):
    """All seven have gradients, written for one and multiplied by what arrives."""
    fg, bg, target = (_make(3, 2, 9, 20, seed=k).to(device) for k in range(3))
    leaves = {"fg": fg, "bg": bg, "target": target, "mask_logits": _make(3, 1, 9, 20, seed=3).to(device)}
    leaves |= {n: _make(3, 1, 1, 1, seed=4).to(device) for n in ("fg_scale", "bg_scale")}
    leaves["weight"] = _make(3, 1, 9, 20, seed=5).to(device)
    leaves = {n: t.requires_grad_() for n, t in leaves.items()}
    for op in (fgbg_cuda.masked_reconstruction_loss, fgbg_cuda.mixture_reconstruction_loss):
        one = torch.autograd.grad(op(**leaves, reduction=reduction).sum(), list(leaves.values()))
        three = torch.autograd.grad((3 * op(**leaves, reduction=reduction)).sum(), list(leaves.values()))
        for a, b in zip(three, one, strict=True):
            assert_close(a, 3 * b)
