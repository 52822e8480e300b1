"""What a call saves and computes depends on its arguments alone: not on the calls before it, on hooks, on
modes, nor on what the upstream gradient is."""

import functools
import random

import pytest
import torch
from compare import assert_close, assert_same, cotangents, gradients
from samples import SAMPLES, each, first_of_each_op
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fgbg_cuda

OPS = sorted({s.op for s in SAMPLES})
UPSTREAM = (1.0, 0.25, -2.0)


def _saved_and_gradients(sample, device, dtype=torch.float32, upstream=1.0):
    """Copies of what forward saves, and the gradients of the weighted sum of its outputs."""
    inputs = sample.inputs(device, dtype, grad=True)
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t.detach().clone()) or t, lambda t: t):
        outputs = [o for o in sample(inputs) if o.requires_grad]
    wanted = [t for t in inputs.values() if t.requires_grad]
    return saved, torch.autograd.grad(outputs, wanted, [torch.full_like(o, upstream) for o in outputs])


@pytest.mark.parametrize("op", OPS)
def test_the_order_of_calls_changes_nothing(op, device):
    """Each sample twice, in two orders, with other upstream gradients in between: the same saved tensors and
    the same gradients, bit for bit."""
    calls = [(s, u) for s in SAMPLES if s.op == op for u in UPSTREAM]
    results = {}
    for seed in (1, 2):
        random.Random(seed).shuffle(calls)
        for sample, upstream in calls:
            results.setdefault((sample.id, upstream), []).append(
                _saved_and_gradients(sample, device, upstream=upstream)
            )
    for key, (first, second) in results.items():
        for kind in (0, 1):
            assert len(first[kind]) == len(second[kind]), key
            for a, b in zip(first[kind], second[kind], strict=True):
                assert_same(a, b, str(key))
    for sample, _ in calls:  # nor does what is saved depend on what arrives
        counts = {len(saved) for u in UPSTREAM for saved, _ in results[sample.id, u]}
        assert len(counts) == 1


class _Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@each(SAMPLES[::2])
def test_a_mode_changes_nothing(sample, device):
    """A profiler or a counter of operations around the forward pass: same results, same saved tensors."""
    saved, expected = _saved_and_gradients(sample, device)
    with _Watching():
        saved_too, found = _saved_and_gradients(sample, device)
    assert len(saved) == len(saved_too)
    for a, b in zip((*saved, *expected), (*saved_too, *found), strict=True):
        assert_same(a, b)


class _Holding(TorchDispatchMode):
    """Keeps the results of this package's ops, and copies of them."""

    def __init__(self):
        super().__init__()
        self.held = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if func.namespace == "fgbg":
            self.held += [(t, t.clone()) for t in tree_leaves(results) if isinstance(t, torch.Tensor)]
        return results


@each(SAMPLES[::2])
def test_what_a_mode_holds_is_not_written_to(sample, device):
    inputs = sample.inputs(device, torch.float32, grad=True)
    expected = gradients(sample(inputs), inputs)
    with _Holding() as mode:
        outputs = sample(inputs)
    for name, gradient in gradients(outputs, inputs).items():
        assert_close(gradient, expected[name], operations=4, note=name)
    assert mode.held
    for t, before in mode.held:
        assert_same(t, before)


def test_lazily_negated_operands_and_seeds(device):
    """Whose memory holds other numbers than the tensor: with gradients and without."""
    mu, logvar, logits = torch.randn(3, 4, 5, device=device)
    seed = torch.tensor([-5], device=device)
    for grad in (False, True):
        plain = [t.clone().requires_grad_(grad) for t in (mu, logvar)]
        lazy = [torch._neg_view(-t).requires_grad_(grad) for t in (mu, logvar)]
        for a, b in zip(
            fgbg_cuda.sample_gaussian(*plain, seed=seed),
            fgbg_cuda.sample_gaussian(*lazy, seed=torch._neg_view(-seed)),
            strict=True,
        ):
            assert_same(a.detach(), b.detach())
    assert_same(fgbg_cuda.bernoulli_kl(torch._neg_view(logits)), fgbg_cuda.bernoulli_kl(-logits))
    assert_same(fgbg_cuda.philox_normal(torch._neg_view(-seed), (3,)), fgbg_cuda.philox_normal(seed, (3,)))


def test_profilers_show_the_ops(device):
    mu, logvar = (torch.randn(4, 5, device=device, requires_grad=True) for _ in range(2))
    with torch.profiler.profile() as profile:
        fgbg_cuda.gaussian_kl(mu, logvar, reduction="none").sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"fgbg::gaussian_kl", "fgbg::gaussian_kl_backward"} <= names


def _weighted(outputs, factor):
    return sum((o * factor).mean() for o in outputs if o.requires_grad)


def _checkpoints(sample, inputs, kind):
    if kind == "plain":
        return sample(inputs)
    if kind == "reentrant":
        return checkpoint(lambda *tensors: sample(dict(zip(inputs, tensors, strict=True))),
                          *inputs.values(), use_reentrant=True)  # fmt: skip
    options = {}
    if kind in POLICIES:
        contexts = functools.partial(create_selective_checkpoint_contexts, lambda *_, **__: POLICIES[kind])
        options["context_fn"] = contexts
    return checkpoint(lambda: sample(inputs), use_reentrant=False, **options)


POLICIES = {"selective": CheckpointPolicy.PREFER_RECOMPUTE, "selective_save": CheckpointPolicy.MUST_SAVE}
KINDS = ("plain", "checkpoint", "selective", "selective_save", "reentrant", "checkpoint", "plain")


@pytest.mark.parametrize("op", OPS)
def test_checkpointed_and_plain_losses_in_any_mixture(op, device):
    """Over several steps, each loss weighted differently: the gradients of that sum without checkpoints."""
    samples = [s for s in SAMPLES if s.op == op]
    for step in range(3):
        chosen = random.Random(step).choices(samples, k=len(KINDS))
        found, expected = [], []
        for results, kinds in ((found, KINDS), (expected, ["plain"] * len(KINDS))):
            total = 0
            leaves = []
            for i, (sample, kind) in enumerate(zip(chosen, kinds, strict=True)):
                inputs = sample.inputs(device, torch.float32, grad=True)
                leaves += [t for t in inputs.values() if t.requires_grad]
                total = total + _weighted(_checkpoints(sample, inputs, kind), UPSTREAM[(i + step) % 3])
            total.backward()
            results += [t.grad for t in leaves]
        for a, b in zip(found, expected, strict=True):
            if b is None:
                assert a is None or not a.any()
            else:
                assert_close(a, b, operations=4)


def test_two_checkpointed_losses_that_are_averaged(device):
    """Saved other tensors when it was repeated, once: it had learnt meanwhile what arrives."""
    x = [torch.randn(4, 8, device=device, requires_grad=True) for _ in range(4)]

    def loss(mu, logvar):
        return fgbg_cuda.gaussian_kl(mu, logvar, reduction="sample")

    total = sum(checkpoint(loss, *pair, use_reentrant=False).mean() for pair in (x[:2], x[2:]))
    total.backward()
    assert_close(x[0].grad, x[0].detach() / 4)


@each(SAMPLES[::3])
def test_hooks_see_what_is_saved_and_keep_it(sample, device):
    """Offloaded, or kept by the one who looks: backward may not write into it."""
    inputs = sample.inputs(device, torch.float32, grad=True)
    expected = gradients(sample(inputs), inputs)
    with torch.autograd.graph.save_on_cpu():
        offloaded = sample(inputs)
    for name, gradient in gradients(offloaded, inputs).items():
        assert_close(gradient, expected[name], operations=4, note=name)
    kept = []
    with saved_tensors_hooks(lambda t: kept.append((t, t.detach().clone())) or t, lambda t: t):
        outputs = sample(inputs)
    gradients(outputs, inputs)
    for t, before in kept:
        assert_same(t.detach(), before)


@each(SAMPLES)
def test_batched_upstream_gradients(sample, device):
    """Several at once are a stack of one at a time; alike before and after other passes."""
    inputs = sample.inputs(device, grad=True)
    outputs = [o for o in sample(inputs) if o.requires_grad]
    wanted = [t for t in inputs.values() if t.requires_grad]
    batches = [torch.stack([c, -2 * c, 0.5 * c]) for c in cotangents(outputs)]
    for _ in range(2):
        found = torch.autograd.grad(outputs, wanted, batches, is_grads_batched=True, retain_graph=True)
        for i in range(3):
            alone = torch.autograd.grad(outputs, wanted, [b[i] for b in batches], retain_graph=True)
            for f, a in zip(found, alone, strict=True):
                assert_close(f[i], a)


@each(first_of_each_op())
def test_vectorized_jacobian(sample, device):
    inputs = sample.inputs(device)
    floats = {n: t for n, t in inputs.items() if t.is_floating_point()}

    def function(*tensors):
        return tuple(sample({**inputs, **dict(zip(floats, tensors, strict=True))}))

    jacobian = torch.autograd.functional.jacobian
    expected = jacobian(function, tuple(floats.values()))
    found = jacobian(function, tuple(floats.values()), vectorize=True)
    for rows, expected_rows in zip(found, expected, strict=True):
        for a, e in zip(rows, expected_rows, strict=True):
            assert_close(a, e)


def test_a_gradient_handed_over_is_the_callers_own(device):
    """In place only where the graph is freed: what an earlier pass gave does not change."""
    mu, logvar = (torch.randn(4, 5, device=device, requires_grad=True) for _ in range(2))
    kl = fgbg_cuda.gaussian_kl(mu, logvar, reduction="sum")
    first = torch.autograd.grad(kl, mu, retain_graph=True)[0]
    copy = first.clone()
    second = torch.autograd.grad(3 * kl, mu)[0]
    assert_same(first, copy)
    assert_close(second, 3 * first)
