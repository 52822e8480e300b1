"""Hard means select: what a mask of bool or uint8, a weight of 0 or an empty region leaves out of a loss may
be anything, NaN and infinity included. Loss and gradients are those, bit for bit, of the same call with any
other numbers there. (A zero of a float mask multiplies, and 0 times NaN is NaN.)

By the kernels of each device, and by the specification.
"""

import functools
import itertools
import math

import compare
import pytest
import torch
from compare import assert_same, cotangents

import fgbg_cuda
from fgbg_cuda import reference

LIKELIHOODS = tuple(reference.LIKELIHOODS)
REDUCTIONS = ("none", "sample", "batchmean", "mean")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
POISON = (math.nan, math.inf, -math.inf, math.nan)
# One that is handled element by element, and one of whole vectors.
SHAPES = ((3, 2, 5, 13), (2, 3, 8, 16))
DTYPES_AND_SHAPES = ((torch.float32, SHAPES[1]), (torch.float64, SHAPES[0]), (torch.bfloat16, SHAPES[1]))


@pytest.fixture(params=["kernels", "specification"])
def by(request, device):
    """Calls a loss: (composition, operands, options) to its outputs."""
    if request.param == "kernels":
        return functools.partial(_by_kernels, device)
    if compare.kernels != "cpu":
        pytest.skip("the specification has no kernels")
    return _by_specification


def _by_kernels(device, composition, operands, options):
    operands = {name: t.to(device) for name, t in operands.items()}
    if composition == "blended" and "fg_scale" in operands:
        operands["scale"] = operands.pop("fg_scale")
    loss = getattr(fgbg_cuda, f"{composition}_reconstruction_loss")(**operands, **options)
    outputs = (loss[0], torch.stack(loss[1])) if isinstance(loss, tuple) else (loss,)
    return tuple(output.cpu() for output in outputs)


def _by_specification(composition, operands, options):
    options = {"reduction": "batchmean", **options}
    options["normalize_area"] = options.pop("normalize", None) == "area"
    wants_terms = options.get("return_terms", False)
    o = dict(operands)
    is_logits = "mask_logits" in o
    mask = o["mask_logits" if is_logits else "mask"]
    loss, terms = reference.reconstruction_loss(
        o["fg"], o["bg"], o["target"], mask, o.get("fg_scale", 1.0), o.get("bg_scale", 1.0),
        None, composition, is_logits, **options,
    )  # fmt: skip
    return (loss, terms[:3]) if wants_terms else (loss,)


def _images(composition, likelihood, dtype, shape):
    generator = torch.Generator().manual_seed(3)

    def make(*size):
        return (0.1 + 0.8 * torch.rand(size, generator=generator, dtype=torch.float64)).to(dtype)

    operands = {name: make(*shape) for name in ("fg", "bg", "target")}
    if likelihood in reference.SCALED_LIKELIHOODS:
        operands["fg_scale"] = make(shape[1])
        if composition == "masked":
            operands["bg_scale"] = make(shape[1])
    return operands


def _coins(shape, channels):
    generator = torch.Generator().manual_seed(4)
    return torch.rand((shape[0], channels, *shape[2:]), generator=generator) < 0.5


def _masks(dtype, shape):
    """Hard masks, of one channel and of each."""
    for channels in (1, shape[1]):
        coins = _coins(shape, channels)
        yield coins
        yield coins.to(torch.uint8) * 3  # anything but 0 is foreground


def _poisoned(t, where, values=POISON):
    values = torch.tensor(values).to(t.dtype)
    pattern = values[torch.arange(t.numel()) % len(values)].reshape(t.shape)
    return torch.where(where, pattern, t)


def _results(by, composition, operands, options, upstream=None):
    """Outputs and gradients by name; those for an upstream gradient of ones as well, which the forward pass
    may have written."""
    leaves = {n: t.detach().clone() for n, t in operands.items()}
    for t in leaves.values():
        t.requires_grad_(t.is_floating_point())
    names = [n for n, t in leaves.items() if t.requires_grad]
    outputs = by(composition, leaves, options)
    results = {f"output {k}": o.detach() for k, o in enumerate(outputs)}
    loss = outputs[0]
    for kind, gradient in (
        ("ones", torch.ones_like(loss)),
        ("any", cotangents([loss])[0] if upstream is None else torch.full_like(loss, upstream)),
    ):
        loss = by(composition, leaves, options)[0]
        found = torch.autograd.grad(loss, [leaves[n] for n in names], gradient)
        results |= {f"{n} for {kind}": g for n, g in zip(names, found, strict=True)}
    with torch.no_grad():
        results |= {f"plain {k}": o for k, o in enumerate(by(composition, leaves, options))}
    return results


def _assert_left_out(by, composition, operands, excluded, options, terms_differ=False):
    """`excluded`: where each operand has no part in the loss."""
    others = {n: torch.where(w, operands[n] * 0.5 + 0.125, operands[n]) for n, w in excluded.items()}
    expected = _results(by, composition, operands | others, options)
    poisoned = {n: _poisoned(operands[n], w) for n, w in excluded.items()}
    actual = _results(by, composition, operands | poisoned, options)
    for name, e in expected.items():
        assert e.isfinite().all(), name
        if not (terms_differ and name.endswith(" 1")):
            assert_same(actual[name], e, name)
    for name, where in excluded.items():
        for kind in ("ones", "any"):
            gradient = actual[f"{name} for {kind}"]
            assert not gradient[where.expand_as(gradient)].any(), name


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("composition", ["masked", "blended"])
def test_a_hard_mask_selects(composition, likelihood, reduction, by):
    for dtype, shape in DTYPES_AND_SHAPES:
        operands = _images(composition, likelihood, dtype, shape)
        for mask in _masks(dtype, shape):
            on = (mask != 0).expand(shape)
            options = {"likelihood": likelihood, "reduction": reduction}
            if composition == "masked":
                options |= {"fg_weight": 1.5, "return_terms": True}
            _assert_left_out(by, composition, operands | {"mask": mask}, {"fg": ~on, "bg": on}, options)


def test_a_hard_mask_selects_each_sample_and_channels_last(by):
    """One reconstruction for both regions; memory in another order."""
    shape = SHAPES[0]
    operands = _images("masked", "squared_error", torch.float32, shape)
    on = _coins(shape, 1)
    operands = {n: t.contiguous(memory_format=torch.channels_last) for n, t in operands.items()}
    for reduction in REDUCTIONS:
        options = {"likelihood": "squared_error", "reduction": reduction}
        excluded = {"fg": ~on.expand(shape), "bg": on.expand(shape)}
        _assert_left_out(by, "masked", operands | {"mask": on}, excluded, options)


@pytest.mark.parametrize("kind", ["mask_logits", "float", "bool", "uint8"])
@pytest.mark.parametrize("channels", [1, "each"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_a_weight_of_zero_selects(likelihood, channels, kind, by):
    for (dtype, shape), reduction in itertools.product(DTYPES_AND_SHAPES, REDUCTIONS):
        operands = _images("masked", likelihood, dtype, shape)
        on = _coins(shape, shape[1] if channels == "each" else 1)
        hard = kind in ("bool", "uint8")
        if hard:
            operands["mask"] = on if kind == "bool" else on.to(torch.uint8)
        else:
            operands["mask_logits" if kind == "mask_logits" else "mask"] = torch.where(on, 0.75, 0.25).to(
                dtype
            )
        everywhere, nowhere = torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        for weights, fg, bg, target in (
            ((0.0, 1.5), everywhere, on & hard, on & hard),
            ((1.5, 0), ~on & hard, everywhere, ~on & hard),
            ((0, -0.0), everywhere, everywhere, everywhere),
        ):
            excluded = {"fg": fg, "bg": bg, "target": target}
            excluded = {n: w.expand(shape) for n, w in excluded.items()}
            if "fg_scale" in operands:
                excluded["fg_scale"] = everywhere[0, :, 0, 0] if weights[0] == 0 else nowhere[0, :, 0, 0]
                excluded["bg_scale"] = everywhere[0, :, 0, 0] if weights[1] == 0 else nowhere[0, :, 0, 0]
            options = dict(zip(("fg_weight", "bg_weight"), weights, strict=True))
            options |= {"likelihood": likelihood, "reduction": reduction}
            _assert_left_out(by, "masked", operands, excluded, options)
            # The terms are those before the weights.
            options |= {"return_terms": True}
            _assert_left_out(by, "masked", operands, excluded, options, terms_differ=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("kind", ["float", "bool"])
def test_an_empty_region_selects(kind, likelihood, reduction, by):
    """Normalised by area: sample 0 is all background and sample 1 all foreground, in numbers or by type."""
    for dtype, shape in DTYPES_AND_SHAPES:
        operands = _images("masked", likelihood, dtype, shape)
        mask = _coins(shape, 1)
        mask[0], mask[1] = False, True
        operands["mask"] = mask if kind == "bool" else mask.to(dtype)
        excluded = {n: torch.zeros(shape, dtype=torch.bool) for n in ("fg", "bg")}
        excluded["fg"][0] = excluded["bg"][1] = True
        options = {"likelihood": likelihood, "reduction": reduction, "normalize": "area"}
        _assert_left_out(by, "masked", operands, excluded, options)


def test_nothing_but_empty_regions(by):
    """Then a scale takes no part either."""
    operands = _images("masked", "gaussian", torch.float32, SHAPES[0])
    operands["mask"] = torch.zeros(SHAPES[0])
    excluded = {n: torch.ones_like(operands[n], dtype=torch.bool) for n in ("fg", "fg_scale")}
    for reduction in REDUCTIONS:
        options = {"likelihood": "gaussian", "reduction": reduction, "normalize": "area"}
        _assert_left_out(by, "masked", operands, excluded, options)


@pytest.mark.parametrize("upstream", [0.0, -2.5])
@pytest.mark.parametrize("composition", ["masked", "blended"])
def test_whatever_finite_gradient_arrives(composition, upstream, by):
    for reduction, dtype in itertools.product(REDUCTIONS, DTYPES):
        operands = _images(composition, "gaussian", dtype, SHAPES[0])
        on = _coins(SHAPES[0], 1)
        operands = {
            **operands,
            "mask": on,
            "fg": _poisoned(operands["fg"], ~on),
            "bg": _poisoned(operands["bg"], on),
        }
        options = {"likelihood": "gaussian", "reduction": reduction}
        found = _results(by, composition, operands, options, upstream)
        assert not found["fg for any"][~on.expand(SHAPES[0])].any()
        assert not found["bg for any"][on.expand(SHAPES[0])].any()
        if composition == "masked":
            found = _results(by, composition, operands, options | {"fg_weight": 0}, upstream)
            assert not found["fg for any"].any()
            assert not found["fg_scale for any"].any()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("composition", ["masked", "blended"])
def test_a_float_mask_multiplies(composition, likelihood, by):
    """0 times NaN is NaN, of a mask, and of an upstream gradient."""
    for dtype, reduction in itertools.product(DTYPES, REDUCTIONS):
        operands = _images(composition, likelihood, dtype, SHAPES[0])
        on = _coins(SHAPES[0], 1)
        operands["mask"] = on.to(dtype)
        operands["fg"][0, 0, 0, 0] = operands["fg"][0, 0, 0, 1] = math.nan
        options = {"likelihood": likelihood, "reduction": reduction}
        found = _results(by, composition, operands, options)
        element = (0, 0, 0, 0)
        index = {"none": element, "sample": (0,)}.get(reduction, ())
        assert found["output 0"][index].isnan()
        if by is _by_specification and likelihood in ("laplace", "absolute_error"):
            continue  # torch takes the sign of NaN for 0
        assert found["fg for any"][element].isnan()
        found = _results(by, composition, operands, options, upstream=0.0)
        assert found["fg for any"][element].isnan()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_gradient_of_the_terms_flows_where_the_weight_is_zero(reduction, by):
    operands = _images("masked", "gaussian", torch.float64, SHAPES[0])
    operands["mask"] = _coins(SHAPES[0], 1).double() * 0.5 + 0.25
    names = list(operands)
    found = []
    for fg_weight in (0, 1.0):
        leaves = {n: t.clone().requires_grad_() for n, t in operands.items()}
        options = {"likelihood": "gaussian", "reduction": reduction, "return_terms": True}
        terms = by("masked", leaves, options | {"fg_weight": fg_weight, "bg_weight": 0.0})[1]
        found.append(torch.autograd.grad(terms.sum(), [leaves[n] for n in names]))
        loss, terms = by("masked", leaves, options | {"fg_weight": fg_weight, "bg_weight": 0.0})
        both = torch.autograd.grad((loss * 0).sum() + terms.sum(), [leaves[n] for n in names])
        for name, a, b in zip(names, both, found[0], strict=True):
            torch.testing.assert_close(a, b, msg=name)
    for name, a, b in zip(names, *found, strict=True):
        assert a.any(), name
        assert_same(a, b, name)


# --- the specification alone ----------------------------------------------------------------------


def _specified(operands, **options):
    return _by_specification("masked", operands, {"likelihood": "gaussian", **options})[0]


def test_weights_may_be_tensors():
    for area, reduction, dtype in itertools.product((None, "area"), REDUCTIONS, DTYPES):
        operands = _images("masked", "gaussian", dtype, SHAPES[0])
        mask = _coins(SHAPES[0], 1)
        mask[0], mask[1] = False, True
        operands["mask"] = mask
        for weights in ((0.0, 1.5), (1.5, 0.0), (0.25, 2.0)):
            number = dict(zip(("fg_weight", "bg_weight"), weights, strict=True))
            tensor = {n: torch.tensor(w) for n, w in number.items()}
            options = {"normalize": area, "reduction": reduction, "likelihood": "gaussian"}
            expected = _results(_by_specification, "masked", operands, options | number)
            actual = _results(_by_specification, "masked", operands, options | tensor)
            for name, e in expected.items():
                assert_same(actual[name], e, name)


@pytest.mark.parametrize("weight", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_transforms(weight):
    """Second derivatives, vmap, forward mode and meta tensors leave the same out."""
    operands = _images("masked", "laplace", torch.float64, SHAPES[0])
    on = _coins(SHAPES[0], 1)
    fg, bg, target = operands["fg"], operands["bg"], operands["target"]
    poisoned = _poisoned(fg, ~on)

    def loss(fg, bg, target, mask=on, weight=1.0):
        return _specified({"fg": fg, "bg": bg, "target": target, "mask": mask}, fg_weight=weight)

    def check(function, left_out=poisoned):
        assert_same(function(left_out), function(torch.where(on, fg, 0.5)))

    ones = torch.ones_like(fg)
    check(torch.func.grad(lambda x: loss(x, bg, target)))
    check(torch.func.grad(lambda x: (torch.func.grad(lambda y: loss(y, bg, target))(x) ** 2).sum()))
    each = torch.func.vmap(lambda *one: loss(*(t[None] for t in one)))
    check(lambda x: each(x, bg, target, on))
    check(lambda x: torch.func.jvp(lambda y: loss(y, bg, target), (x,), (ones,))[1])
    nothing = torch.full_like(fg, math.nan)
    check(torch.func.grad(lambda x: loss(x, bg, target, weight=weight)), nothing)
    check(lambda x: torch.func.jvp(lambda y: loss(y, bg, target, weight=weight), (x,), (ones,))[1], nothing)
    meta = loss(*(t.to("meta") for t in (fg, bg, target, on)), weight=0.0)
    assert meta.shape == ()


def test_second_derivatives_of_the_kernels():
    operands = _images("masked", "gaussian", torch.float64, SHAPES[0])
    on = _coins(SHAPES[0], 1)
    bg, target = operands["bg"].requires_grad_(), operands["target"].requires_grad_()
    found = []
    for fg in (_poisoned(operands["fg"], ~on), torch.where(on, operands["fg"], 0.5)):
        fg = fg.requires_grad_()
        loss = fgbg_cuda.masked_reconstruction_loss(fg, bg, target, mask=on)
        first = torch.autograd.grad(loss, (fg, bg, target), create_graph=True)
        found.append(torch.autograd.grad(sum((g**2).sum() for g in first), (fg, bg, target)))
    for a, b in zip(*found, strict=True):
        assert_same(a, b)
