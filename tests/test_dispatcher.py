"""torch.library.opcheck (schema, fake kernel, autograd registration, AOT tracing) on the ops behind
the public functions: on each call that a sample makes, forward and backward."""

import pytest
import torch
from compare import gradients
from samples import SAMPLES, covering, each, first_of_each_op
from torch.utils._python_dispatch import TorchDispatchMode

import fgbg_cuda

# Numbers, which are tensors for the dispatcher, and get no gradient.
NUMBERS = ("fg_weight", "bg_weight", "prior_logit")


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
    """The sample's forward and backward calls, with inputs that require gradients. (With a graph of the
    derivative, since a reduced loss's backward pass is mere multiplication otherwise.)"""
    inputs = {
        n: layout(t.detach()).requires_grad_(t.requires_grad)
        for n, t in sample.inputs(device, grad=True).items()
    }
    with _Calls() as calls:
        gradients(sample(inputs), inputs, create_graph=True)
    for func, args in calls.seen:
        names = [argument.name for argument in func._schema.arguments]
        yield (
            func,
            [
                a.detach().requires_grad_(a.is_floating_point() and name not in NUMBERS)
                if torch.is_tensor(a)
                else a
                for name, a in zip(names, args, strict=False)
            ],
        )


_QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")


@each(covering(SAMPLES))
def test_opcheck(sample, device):
    for func, args in _calls(sample, device):
        torch.library.opcheck(func, args, test_utils=_QUICK)
        # As it is called below autograd: told which gradients, or what else, to save.
        below = [a.detach() if torch.is_tensor(a) else a for a in args]
        torch.library.opcheck(func, below, test_utils=("test_schema", "test_faketensor"))


def _channels_last(t):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.contiguous(memory_format=formats.get(t.dim(), torch.contiguous_format))


@each([s for s in SAMPLES if max(len(m.shape) for m in s.tensors.values()) in (4, 5)])
def test_fake_strides_of_channels_last(sample, device):
    """The compiler plans memory by what the fake kernel says: it must be what the kernel does."""
    for func, args in _calls(sample, device, _channels_last):
        torch.library.opcheck(func, args, test_utils="test_faketensor")


@pytest.mark.not_emulated("traced with the ops of the CPU")
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


@pytest.mark.parametrize("size", [(), (0,), (7,), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_philox_normal(size, dtype, device):
    seed = torch.tensor([5], device=device)
    torch.library.opcheck(torch.ops.fgbg.philox_normal.default, (seed, size, 3, dtype))


def test_every_op_of_the_library_is_checked(device):
    """A new op that no sample reaches would be missed by all generated tests."""
    seen = {f.name() for s in first_of_each_op() for f, _ in _calls(s, device)}
    registered = {
        name
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fgbg::") and name != "fgbg::philox_normal"
    }
    assert seen == registered
    assert fgbg_cuda.build_info()["torch"] == torch.__version__
