"""The module forms: the functions, with options that survive copying."""

import copy
import pickle

import pytest
import torch
from compare import assert_same
from samples import SAMPLES, each

from fgbg_cuda import nn

MODULES = {
    "reparameterize": nn.Reparameterize,
    "gaussian_kl": nn.GaussianKL,
    "sample_gaussian": nn.SampleGaussian,
    "gaussian_log_prob": nn.GaussianLogProb,
    "bernoulli_kl": nn.BernoulliKL,
    "categorical_kl": nn.CategoricalKL,
    "reconstruction_loss": nn.ReconstructionLoss,
    "masked_reconstruction_loss": nn.MaskedReconstructionLoss,
    "blended_reconstruction_loss": nn.BlendedReconstructionLoss,
    "mixture_reconstruction_loss": nn.MixtureReconstructionLoss,
    "slot_mixture_loss": nn.SlotMixtureLoss,
    "slot_blended_loss": nn.SlotBlendedLoss,
}
# What changes from call to call goes to forward.
CALL_OPTIONS = (
    "seed", "offset", "generator", "bg", "prior_logits", "prior_mu", "prior_logvar", "mu", "logvar",
)  # fmt: skip


def _module(sample):
    """The sample's module, and what of its options goes to forward."""
    call = {k: v for k, v in sample.options.items() if k in CALL_OPTIONS}
    options = {k: v for k, v in sample.options.items() if k not in CALL_OPTIONS}
    return MODULES[sample.op](**options), call


def _flat(results):
    if isinstance(results, torch.Tensor):
        return [results]
    return [t for r in results for t in _flat(r)]


def test_every_op_has_a_module():
    assert {s.op for s in SAMPLES} == set(MODULES)
    assert {m.__name__ for m in MODULES.values()} == set(nn.__all__)


@pytest.mark.parametrize(
    "copied",
    [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["itself", "deepcopy", "pickle"],
)
@each(SAMPLES[::3])
def test_module_is_its_function(sample, device, copied):
    module, call = _module(sample)
    inputs = sample.inputs(device)
    for actual, expected in zip(_flat(copied(module)(**inputs, **call)), sample(inputs), strict=True):
        assert_same(actual, expected)


@each(SAMPLES[::5])
def test_extra_repr_shows_the_options(sample):
    module, call = _module(sample)
    for name, value in sample.options.items():
        if name not in call:
            assert f"{name}={value!r}" in repr(module)


@pytest.mark.parametrize("module", MODULES.values(), ids=lambda m: m.__name__)
def test_unknown_option(module):
    with pytest.raises(TypeError, match="reductoin"):
        module(reductoin="sum")


def test_module_has_no_parameters_of_its_own():
    """A learned scale belongs to the model that learns it."""
    for module in MODULES.values():
        assert not list(module().parameters())
        assert not module().state_dict()


LEARNED = [
    (nn.MaskedReconstructionLoss, "fg_scale"),
    (nn.MixtureReconstructionLoss, "bg_scale"),
    (nn.BlendedReconstructionLoss, "scale"),
]


def _loss(module, dtype=torch.float32):
    torch.manual_seed(1)
    fg, bg, target, logits = (torch.rand(2, 1, 3, 4, dtype=dtype) for _ in range(4))
    return module(fg, bg, target, mask_logits=logits)


@pytest.mark.parametrize(("cls", "name"), LEARNED)
def test_a_learned_scale_is_a_parameter(cls, name):
    """In parameters() and the state_dict; it moves with the module, and an optimizer moves it."""
    for scale in (torch.nn.Parameter(torch.tensor(0.5)), torch.nn.Parameter(torch.tensor([0.5]))):
        module = torch.nn.Sequential(cls(likelihood="gaussian", **{name: scale}))
        assert dict(module.named_parameters()).keys() == {f"0.{name}"}
        assert module.state_dict().keys() == {f"0.{name}"}
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        before = _loss(module[0])
        before.backward()
        optimizer.step()
        assert _loss(module[0]) < before
        assert _loss(module.double()[0], torch.float64).dtype == torch.float64
        other = cls(likelihood="gaussian", **{name: torch.nn.Parameter(torch.ones(scale.shape))})
        other.load_state_dict(module[0].state_dict())
        assert_same(_loss(other.double(), torch.float64), _loss(module[0], torch.float64))


@pytest.mark.parametrize(("cls", "name"), LEARNED)
def test_a_scale_that_is_not_learned_is_a_buffer(cls, name):
    module = cls(likelihood="laplace", **{name: torch.tensor(0.5)})
    assert not list(module.parameters())
    assert module.state_dict().keys() == {name}
    assert getattr(module.to("meta"), name).is_meta


def test_another_tensor_that_learns_goes_to_forward():
    """A copy of it would learn in its place, unseen."""
    leaf = torch.ones(1, requires_grad=True)
    computed = leaf.exp()
    for scale in (leaf, computed):
        with pytest.raises(ValueError, match="fg_scale is a tensor that requires a gradient"):
            nn.MaskedReconstructionLoss(fg_scale=scale)
    module = nn.MaskedReconstructionLoss(likelihood="gaussian")
    x = torch.rand(2, 1, 3, 4)
    module(x, x, x, mask=x, fg_scale=computed).backward()
