"""Losses of slots beyond what every op is tested for: excluded slots, extremes, agreement with other losses,
and the lines of object-centric codebases that they replace."""

import math

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, assert_same, gradients

import fgbg_cuda
from fgbg_cuda import reference

INF = math.inf
MIXTURES = ("joint", "independent")


def _inputs(device, slots=4, shape=(2, 3, 5, 7), dtype=torch.float64, grad=True):
    generator = torch.Generator().manual_seed(slots)
    batch, channels, *spatial = shape
    made = {
        "slots": torch.randn(batch, slots, channels, *spatial, dtype=dtype, generator=generator),
        "target": torch.rand(shape, dtype=dtype, generator=generator),
        "mask_logits": 2 * torch.randn(batch, slots, 1, *spatial, dtype=dtype, generator=generator),
    }
    return {n: t.to(device).requires_grad_(grad) for n, t in made.items()}


def _call(op, inputs, **options):
    return getattr(fgbg_cuda, op)(**inputs, **options)


OPS = (
    ("slot_mixture_loss", {"channels": "joint"}),
    ("slot_mixture_loss", {"channels": "independent"}),
    ("slot_blended_loss", {}),
)


@pytest.mark.parametrize(("op", "options"), OPS)
@pytest.mark.parametrize("name", ["mask_logits", "log_mask"])
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_a_slot_whose_mask_is_minus_infinity_is_excluded(op, options, name, reduction, device):
    """As if it were not there, whatever it holds; its gradients are 0."""
    inputs = _inputs(device, grad=False)
    mask = inputs.pop("mask_logits")
    mask = mask if name == "mask_logits" else torch.log_softmax(mask, 1)
    kept = {**inputs, name: mask[:, [0, 2, 3]], "slots": inputs["slots"][:, [0, 2, 3]]}
    kept = {n: t.clone().requires_grad_() for n, t in kept.items()}
    mask = mask.clone()
    mask[:, 1] = -INF
    slots = inputs["slots"].clone()
    slots[:, 1, :, ::2], slots[:, 1, :, 1::2] = math.nan, INF
    excluding = {**inputs, "slots": slots, name: mask}
    excluding = {n: t.clone().requires_grad_() for n, t in excluding.items()}
    actual = _call(op, excluding, reduction=reduction, scale=0.7, **options)
    expected = _call(op, kept, reduction=reduction, scale=0.7, **options)
    assert_close(actual, expected)
    first, second = gradients([actual], excluding), gradients([expected], kept)
    assert_close(first["target"], second["target"])
    for n in ("slots", name):
        assert_close(first[n][:, [0, 2, 3]], second[n], note=n)
        assert not first[n][:, 1].any()


def test_where_every_slot_is_excluded_the_loss_is_infinite(device):
    inputs = _inputs(device, grad=False)
    mask = torch.log_softmax(inputs.pop("mask_logits"), 1)
    mask[0, :, :, 0, 0] = -INF
    inputs = {**inputs, "log_mask": mask}
    inputs = {n: t.requires_grad_() for n, t in inputs.items()}
    loss, posterior = fgbg_cuda.slot_mixture_loss(**inputs, reduction="none", return_responsibilities=True)
    assert loss[0, 0, 0, 0] == INF
    assert loss.flatten()[1:].isfinite().all()
    assert not posterior[0, :, 0, 0, 0].any()
    for name, gradient in gradients([loss], inputs).items():
        assert gradient.isfinite().all(), name
    d = gradients([fgbg_cuda.slot_mixture_loss(**inputs, reduction="none")], inputs)
    assert not d["slots"][0, :, :, 0, 0].any()
    assert not d["log_mask"][0, :, :, 0, 0].any()
    assert not d["target"][0, :, 0, 0].any()


@pytest.mark.parametrize("likelihood", sorted(reference.LIKELIHOODS))
@pytest.mark.parametrize("channels", MIXTURES)
def test_two_slots_are_the_mixture_of_two_layers(likelihood, channels, device):
    """The logit of a layer is the difference of the slots'."""
    inputs = _inputs(device, slots=2)
    loss = fgbg_cuda.slot_mixture_loss(**inputs, likelihood=likelihood, channels=channels)
    fg, bg = (inputs["slots"][:, k].detach().requires_grad_() for k in range(2))
    logits = (inputs["mask_logits"][:, 0] - inputs["mask_logits"][:, 1]).detach().requires_grad_()
    target = inputs["target"].detach().requires_grad_()
    layers = {"fg": fg, "bg": bg, "target": target, "mask_logits": logits}
    expected = fgbg_cuda.mixture_reconstruction_loss(**layers, likelihood=likelihood, channels=channels)
    assert_close(loss, expected)
    d, e = gradients([loss], inputs), gradients([expected], layers)
    assert_close(d["slots"], torch.stack([e["fg"], e["bg"]], 1))
    assert_close(d["mask_logits"][:, 0], e["mask_logits"])
    assert_close(d["mask_logits"][:, 1], -e["mask_logits"])
    assert_close(d["target"], e["target"])


@pytest.mark.parametrize(("op", "options"), OPS)
def test_one_slot_is_the_plain_loss(op, options, device):
    inputs = _inputs(device, slots=1)
    loss = _call(op, inputs, scale=0.3, **options)
    plain = {"prediction": inputs["slots"][:, 0].detach().requires_grad_()}
    plain["target"] = inputs["target"].detach().requires_grad_()
    expected = fgbg_cuda.reconstruction_loss(**plain, scale=0.3)
    assert_close(loss, expected)
    d, e = gradients([loss], inputs), gradients([expected], plain)
    assert_close(d["slots"][:, 0], e["prediction"])
    assert_close(d["target"], e["target"])
    assert d["mask_logits"].abs().max() < 1e-12


@pytest.mark.parametrize("slots", [1, 2, 7, 8, 9, 32, 33])
@pytest.mark.parametrize(("op", "options"), OPS)
def test_any_number_of_slots(op, options, slots, device):
    for dtype in (torch.float64, torch.float32):
        inputs = _inputs(device, slots, (2, 3, 8, 8), dtype)
        wide = {n: t.detach().double().requires_grad_() for n, t in inputs.items()}
        composition = "blended" if op == "slot_blended_loss" else f"mixture_{options['channels']}"
        actual = _call(op, inputs, scale=0.4, **options)
        expected = reference.slot_loss(*wide.values(), 0.4, None, composition, True, "gaussian")[0]
        assert_close(actual, expected)
        d, e = gradients([actual], inputs), gradients([expected], wide)
        for name in d:
            assert_close(d[name], e[name], note=name)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_small_scales_and_large_logits(offset, device):
    """Nats of 10^4 that differ by thousands: densities of that would overflow. The softmax does not see what
    all logits have in common."""
    inputs = _inputs(device, 5, (2, 3, 4, 4), torch.float32, grad=False)
    inputs["slots"] *= 5
    inputs["mask_logits"] *= 10
    inputs = {n: t.requires_grad_() for n, t in inputs.items()}
    wide = {n: t.detach().double().requires_grad_() for n, t in inputs.items()}
    shifted = {**inputs, "mask_logits": inputs["mask_logits"].detach() + offset}
    wide["mask_logits"] = shifted["mask_logits"].detach().double().requires_grad_()
    shifted["mask_logits"].requires_grad_()
    actual = fgbg_cuda.slot_mixture_loss(**shifted, scale=0.05, reduction="none")
    expected = reference.slot_loss(
        *wide.values(), 0.05, None, "mixture_joint", True, "gaussian", reduction="none"
    )[0]
    assert actual.isfinite().all()
    assert actual.max() > 1e3
    torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=1e-5)
    d, e = gradients([actual], shifted), gradients([expected], wide)
    for name in d:
        largest = e[name].abs().max().item()
        assert_close(d[name] / largest, e[name] / largest, torch.float32, 256, note=name)


def test_gradient_of_a_mask_keeps_its_relative_accuracy(device):
    """m - r, where both are nearly equal: slots that fit nearly equally well, and a mask that is nearly
    certain."""
    generator = torch.Generator().manual_seed(1)
    target = torch.rand(2, 3, 8, 8, generator=generator)
    alike = target[:, None] + 0.5 + 1e-3 * torch.rand(2, 5, 3, 8, 8, generator=generator)
    logits = torch.randn(2, 5, 1, 8, 8, generator=generator)
    different = torch.rand(2, 5, 3, 8, 8, generator=generator)
    certain = logits.clone()
    certain[:, 2] += 15
    for slots, mask in ((alike, logits), (different, certain), (alike, certain)):
        leaves = {"slots": slots, "target": target, "mask_logits": mask}
        narrow = {n: t.to(device).clone().requires_grad_() for n, t in leaves.items()}
        wide = {n: t.to(device).double().requires_grad_() for n, t in leaves.items()}
        d = torch.autograd.grad(fgbg_cuda.slot_mixture_loss(**narrow, reduction="sum"), narrow["mask_logits"])
        e = torch.autograd.grad(fgbg_cuda.slot_mixture_loss(**wide, reduction="sum"), wide["mask_logits"])
        # Relative to the largest of a pixel, of which the others are differences.
        largest = e[0].abs().amax(1, keepdim=True)
        # The nats, of order 1, are rounded, and their differences are of this size.
        nats = (
            slots.to(device).double().sub(target.to(device).double()[:, None]).square().sum(2, keepdim=True)
        )
        spread = (nats.amax(1, keepdim=True) - nats.amin(1, keepdim=True)).clamp(max=1)
        bound = 64 * torch.finfo(torch.float32).eps / spread
        assert bool(((d[0].double() - e[0]).abs() <= bound * largest).all())


def test_responsibilities(device):
    """The posterior sums to one, is what the gradient weighs slots by, and does not depend on the weight."""
    inputs = _inputs(device)
    weight = (torch.rand(2, 1, 5, 7, device=device) > 0.5).double()
    for channels in MIXTURES:
        loss, posterior = fgbg_cuda.slot_mixture_loss(
            **inputs, channels=channels, scale=0.5, reduction="sum", return_responsibilities=True
        )
        assert not posterior.requires_grad
        assert_close(posterior.sum(1), torch.ones_like(posterior.sum(1)))
        d = torch.autograd.grad(loss, inputs["slots"])[0]
        residual = (inputs["slots"] - inputs["target"].unsqueeze(1)) / 0.25
        assert_close(d, posterior * residual)
        same = fgbg_cuda.slot_mixture_loss(
            **inputs, channels=channels, scale=0.5, weight=weight, return_responsibilities=True
        )[1]
        assert_close(same, posterior)


@pytest.mark.parametrize(("op", "options"), OPS)
def test_weight_of_zero_leaves_an_element_out(op, options, device):
    inputs = _inputs(device, grad=False)
    weight = torch.ones(2, 1, 5, 7, dtype=torch.float64, device=device)
    weight[:, :, 1:3] = 0
    spoilt = {n: t.clone() for n, t in inputs.items()}
    for t in spoilt.values():
        t[..., 1:3, :] = math.nan
    results = []
    for made in (inputs, spoilt):
        leaves = {**made, "weight": weight}
        leaves = {n: t.clone().requires_grad_() for n, t in leaves.items()}
        loss = _call(op, leaves, **options)
        results.append((loss, gradients([loss], leaves)))
    assert_close(results[1][0], results[0][0])
    for name, gradient in results[1][1].items():
        assert_close(gradient, results[0][1][name], note=name)
        assert not gradient[..., 1:3, :].any()


@pytest.mark.parametrize(("op", "options"), OPS)
@pytest.mark.parametrize(
    "shape", [(3,), (2, 3, 2, 4, 5), (1, 3, 1, 4, 5), (2, 4, 5), (2, 1, 1, 1, 1), (4, 5)]
)
@pytest.mark.parametrize("spatial", [2, 3])
def test_scales_of_every_shape(op, options, shape, spatial, device):
    """Per slot, or what broadcasts, to six dimensions too. Gradients of what is broadcast are summed."""
    blended = op == "slot_blended_loss"
    if blended and len(shape) == 5:
        shape = (shape[0], *shape[2:])
    if blended and len(shape) == 1:
        shape = (2,)
    if spatial == 3:
        shape = (*shape, 2) if len(shape) > 1 else shape
    inputs = _inputs(device, 3, (2, 2, 4, 5, 2)[: spatial + 2])
    scale = 0.5 + torch.rand(shape, dtype=torch.float64, device=device)
    leaves = {**inputs, "scale": scale.requires_grad_()}
    wide = {n: t.detach().clone().requires_grad_() for n, t in leaves.items()}
    composition = "blended" if blended else f"mixture_{options['channels']}"
    for reduction in ("sum", "sample", "none"):
        actual = _call(op, leaves, reduction=reduction, **options)
        expected = reference.slot_loss(*wide.values(), None, composition, True, "gaussian", reduction)[0]
        assert_close(actual, expected)
        d, e = gradients([actual], leaves), gradients([expected], wide)
        for name in d:
            assert_close(d[name], e[name], note=name)


@pytest.mark.parametrize(("op", "options"), OPS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 3, 61, 71)])
def test_channels_last_slots(op, options, shape, device):
    """[B, K, *spatial, C], as slot attention has them, permuted; also across blocks and segments."""
    inputs = _inputs(device, shape=shape)
    view = inputs["slots"].detach().permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    other = {**inputs, "slots": view.requires_grad_()}
    first, second = _call(op, inputs, **options), _call(op, other, **options)
    assert_close(second, first)
    d, e = gradients([second], other), gradients([first], inputs)
    assert_close(d["slots"], e["slots"])


@pytest.mark.parametrize(("op", "options"), OPS)
@pytest.mark.parametrize("shape", [(0, 3, 5, 7), (2, 3, 5, 0)])
@pytest.mark.parametrize("reduction", ["batchmean", "none", "sample", "sum", "mean"])
@pytest.mark.parametrize("scale", [(), (1, 1, 1, 1)])
def test_no_elements(op, options, shape, reduction, scale, device):
    inputs = _inputs(device, shape=shape)
    inputs["scale"] = torch.full(scale, 0.5, dtype=torch.float64, device=device).requires_grad_()
    wide = {n: t.detach().clone().requires_grad_() for n, t in inputs.items()}
    composition = "blended" if op == "slot_blended_loss" else f"mixture_{options['channels']}"
    actual = _call(op, inputs, reduction=reduction, **options)
    expected = reference.slot_loss(*wide.values(), None, composition, True, "gaussian", reduction)[0]
    assert_close(actual, expected)
    d, e = gradients([actual], inputs), gradients([expected], wide)
    for name in d:
        assert d[name].shape == inputs[name].shape
        assert_close(d[name], e[name], note=name)


@pytest.mark.not_emulated("threads are those of the CPU kernels")
@pytest.mark.parametrize(("op", "options"), OPS)
def test_same_bits_on_any_number_of_threads(op, options, device, threads):
    inputs = _inputs(device, 7, (3, 3, 65, 129), torch.float32)
    inputs["scale"] = (0.5 + torch.rand(1, device=device)).requires_grad_()
    results = []
    for number in (1, 2, 4):
        threads(number)
        loss = _call(op, inputs, **options)
        results.append((loss, gradients([loss], inputs)))
    for loss, d in results[1:]:
        assert_same(loss, results[0][0])
        for name in d:
            assert_same(d[name], results[0][1][name], name)


@pytest.mark.parametrize(("op", "options"), OPS)
def test_a_loss_has_the_same_bits_with_and_without_gradients(op, options, device):
    inputs = _inputs(device, 5, (2, 3, 32, 40), torch.float32)
    with torch.no_grad():
        without = _call(op, inputs, **options)
    assert_same(_call(op, inputs, **options).detach(), without)
    alone = {**{n: t.detach() for n, t in inputs.items()}, "target": inputs["target"]}
    assert_same(_call(op, alone, **options).detach(), without)


# --- you have, you write ---------------------------------------------------------------------------


def _codebase_inputs(device):
    generator = torch.Generator().manual_seed(3)
    slots = torch.rand(2, 4, 3, 6, 6, dtype=torch.float64, generator=generator)
    logits = torch.randn(2, 4, 1, 6, 6, dtype=torch.float64, generator=generator)
    image = torch.rand(2, 3, 6, 6, dtype=torch.float64, generator=generator)
    return slots.to(device), logits.to(device), image.to(device)


def test_monet(device):
    """Stick-breaking scopes, a scale of the background and one of the others."""
    slots, logits, image = _codebase_inputs(device)
    log_scope = torch.zeros_like(logits[:, 0])
    log_masks = []
    for k in range(3):
        log_masks.append(log_scope + F.logsigmoid(logits[:, k]))
        log_scope = log_scope + F.logsigmoid(-logits[:, k])
    log_mask = torch.stack([*log_masks, log_scope], 1)
    sigma = torch.tensor([0.09, 0.11, 0.11, 0.11], dtype=torch.float64, device=device)
    density = torch.distributions.Normal(slots, sigma.view(1, 4, 1, 1, 1)).log_prob(image[:, None])
    expected = -torch.logsumexp(log_mask + density.sum(2, keepdim=True), 1).sum((1, 2, 3)).mean()
    assert_close(fgbg_cuda.slot_mixture_loss(slots, image, log_mask=log_mask, scale=sigma), expected)


def test_genesis(device):
    """A mixture of each channel, from log-masks."""
    slots, logits, image = _codebase_inputs(device)
    log_mask = torch.log_softmax(logits, 1)
    density = torch.distributions.Normal(slots, 0.7).log_prob(image[:, None])
    expected = -torch.log((log_mask + density).exp().sum(1)).flatten(1).sum(1)
    actual = fgbg_cuda.slot_mixture_loss(
        slots, image, log_mask=log_mask, scale=0.7, channels="independent", reduction="sample"
    )
    assert_close(actual, expected)


def test_iodine(device):
    """Logits, and the posterior over the slots that its refinement network looks at."""
    slots, logits, image = _codebase_inputs(device)
    mask = torch.softmax(logits, 1)
    density = torch.distributions.Normal(slots, 0.1).log_prob(image[:, None]).sum(2, keepdim=True)
    weighted = torch.log(mask) + density
    posterior = torch.softmax(weighted, 1)
    actual, responsibilities = fgbg_cuda.slot_mixture_loss(
        slots, image, mask_logits=logits, scale=0.1, return_responsibilities=True
    )
    assert_close(actual, -torch.logsumexp(weighted, 1).sum((1, 2, 3)).mean())
    assert_close(responsibilities, posterior)


def test_slot_attention(device):
    """Decoder output [B, K, H, W, C + 1], of which the last channel is the mask's."""
    slots, logits, image = _codebase_inputs(device)
    decoded = torch.cat([slots, logits], 2).permute(0, 1, 3, 4, 2).contiguous()
    recons, masks = decoded.split([3, 1], -1)
    masks = F.softmax(masks, 1)
    combined = (recons * masks).sum(1).permute(0, 3, 1, 2)
    expected = F.mse_loss(combined, image)
    recons, logits = decoded.permute(0, 1, 4, 2, 3).split([3, 1], 2)
    actual = fgbg_cuda.slot_blended_loss(
        recons, image, mask_logits=logits, likelihood="squared_error", reduction="mean"
    )
    assert_close(actual, expected)


def test_video_of_slots(device):
    """[B, T, K, C, H, W]: a loss for each frame."""
    slots, logits, image = _codebase_inputs(device)
    video = (t[None].expand(3, *t.shape) for t in (slots, image, logits))
    slots_, image_, logits_ = video
    loss = fgbg_cuda.slot_mixture_loss(slots_, image_, mask_logits=logits_, batch_dims=2, reduction="sample")
    assert loss.shape == (3, 2)
    expected = fgbg_cuda.slot_mixture_loss(slots, image, mask_logits=logits, reduction="sample")
    assert_close(loss, expected.expand(3, 2))
