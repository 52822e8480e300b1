"""torch.library.opcheck (schema, fake kernel, autograd registration, AOT tracing) on the ops behind
the public functions: on each call that a sample makes, forward and backward."""

import dataclasses

import pytest
import torch
from compare import gradients
from samples import SAMPLES, covering, each, first_of_each_op
from torch.utils._python_dispatch import TorchDispatchMode

import fgbg_cuda


class _Calls(TorchDispatchMode):
    """Records the calls of this package's ops."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fgbg":
            self.seen.append((func, args))
        return func(*args, **(kwargs or {}))


def _calls(sample, device, layout=lambda t: t):
    """The sample's forward and backward calls, with inputs that require gradients."""
    inputs = {
        n: layout(t.detach()).requires_grad_(t.requires_grad)
        for n, t in sample.inputs(device, grad=True).items()
    }
    with _Calls() as calls:
        gradients(sample(inputs), inputs)
    for func, args in calls.seen:
        yield (
            func,
            [a.detach().requires_grad_(a.is_floating_point()) if torch.is_tensor(a) else a for a in args],
        )


_QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")


@each(covering(SAMPLES))
def test_opcheck(sample, device):
    for func, args in _calls(sample, device):
        torch.library.opcheck(func, args, test_utils=_QUICK)


def _channels_last(t):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.contiguous(memory_format=formats.get(t.dim(), torch.contiguous_format))


@each([s for s in SAMPLES if max(len(m.shape) for m in s.tensors.values()) in (4, 5)])
def test_fake_strides_of_channels_last(sample, device):
    """The compiler plans memory by what the fake kernel says: it must be what the kernel does."""
    for func, args in _calls(sample, device, _channels_last):
        torch.library.opcheck(func, args, test_utils="test_faketensor")


@each(first_of_each_op())
def test_opcheck_with_tracing(sample, device):
    """The rest of opcheck, a second per call: AOT dispatch with dynamic shapes, and its gradients."""
    for func, args in _calls(sample, device):
        torch.library.opcheck(func, args, test_utils="test_aot_dispatch_dynamic")


@each(first_of_each_op())
def test_each_call_is_one_forward_and_one_backward_op(sample, device):
    """Nothing falls back to the specification unnoticed."""
    names = [func.name() for func, _ in _calls(sample, device)]
    assert len(names) == 2
    assert names[1] == f"{names[0]}_backward"


SAMPLING = ("reparameterize", "sample_gaussian")


def _fused(func, args, into):
    """The ops that the eager way takes in the place of a loss and its backward op: their calls, made from a
    recorded call of the loss."""
    needs = [torch.is_tensor(a) and a.is_floating_point() for a in args[:into]]
    if any(a == "sample" for a in args if isinstance(a, str)):
        needs[4:] = [False] * len(needs[4:])  # not fusable: the gradients of scales sum over samples
    fused = getattr(torch.ops.fgbg, f"{func.name().split('::')[1]}_with_gradients").default
    yield fused, [*args, needs]
    loss, *_, gradients = fused(*args, needs)
    update = getattr(torch.ops.fgbg, f"{func.name().split('::')[1]}_backward_").default
    options = args[:-1] if "reconstruction" in func.name() else args
    yield update, [gradients, torch.full_like(loss, 0.5), *options, needs]


@pytest.mark.parametrize("reduction", ["sample", "batchmean"])
@each([s for s in first_of_each_op() if s.op not in SAMPLING])
def test_opcheck_of_fused_ops(sample, reduction, device):
    inputs = {"gaussian_kl": 4, "bernoulli_kl": 2}.get(sample.op, 6)
    reduced = dataclasses.replace(sample, options={**sample.options, "reduction": reduction})
    func, args = next(_calls(reduced, device))
    args = [a.detach() if torch.is_tensor(a) else a for a in args]
    for fused, fused_args in _fused(func, args, inputs):
        torch.library.opcheck(fused, fused_args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sample", "batchmean"])
def test_opcheck_of_kept_gradients(reduction, with_prior):
    """Of samples, on the CPU alone."""
    mu, logvar = torch.randn(4, 3, 5), torch.randn(5, 3, 4).transpose(0, 2)
    prior = torch.randn(2, 4, 3, 5) if with_prior else (None, None)
    seed, ops, tests = torch.tensor([3]), torch.ops.fgbg, ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.reparameterize_with_gradient.default, (mu, logvar, seed, 2), test_utils=tests)
    args = (mu, logvar, *prior, seed, 2, reduction)
    torch.library.opcheck(ops.sample_gaussian_with_gradient.default, args, test_utils=tests)
    z, kl, slope = ops.sample_gaussian_with_gradient(*args)
    needs = [True, True, with_prior, False]
    for grad_kl in (None, torch.ones_like(kl)):
        args = (slope, torch.ones_like(z), grad_kl, mu, logvar, *prior, reduction, needs)
        torch.library.opcheck(ops.sample_gaussian_backward_.default, args, test_utils=tests)


@pytest.mark.parametrize("size", [(), (0,), (7,), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_philox_normal(size, dtype, device):
    seed = torch.tensor([5], device=device)
    torch.library.opcheck(torch.ops.fgbg.philox_normal.default, (seed, size, 3, dtype))


def test_every_op_of_the_library_is_checked(device):
    """A new op that no sample reaches would be missed by all generated tests."""
    seen = {f.name() for s in first_of_each_op() for f, _ in _calls(s, device)}
    for loss in ("gaussian_kl", "bernoulli_kl", "reconstruction_loss"):
        seen |= {f"fgbg::{loss}_with_gradients", f"fgbg::{loss}_backward_"}
    seen |= {f"fgbg::{name}_with_gradient" for name in SAMPLING} | {"fgbg::sample_gaussian_backward_"}
    registered = {
        name
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fgbg::") and name != "fgbg::philox_normal"
    }
    assert seen == registered
    assert fgbg_cuda.build_info()["torch"] == torch.__version__
