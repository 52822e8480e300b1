"""Bad calls: a ValueError or TypeError that names the argument, before any work is done."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from compare import assert_close, assert_same

import fgbg_cuda

KL, DRAW, BOTH = fgbg_cuda.gaussian_kl, fgbg_cuda.reparameterize, fgbg_cuda.sample_gaussian
BERNOULLI, NOISE = fgbg_cuda.bernoulli_kl, fgbg_cuda.philox_normal
LOG_PROB, CATEGORICAL = fgbg_cuda.gaussian_log_prob, fgbg_cuda.categorical_kl
MASKED = fgbg_cuda.masked_reconstruction_loss
BLENDED = fgbg_cuda.blended_reconstruction_loss
MIXTURE = fgbg_cuda.mixture_reconstruction_loss
PLAIN = fgbg_cuda.reconstruction_loss
BOUND = fgbg_cuda.importance_weighted_bound
SLOTS, SLOT_BLEND = fgbg_cuda.slot_mixture_loss, fgbg_cuda.slot_blended_loss

# Latents, and an image of three channels with its masks: what is right about every call below.
Z = torch.zeros(2, 3)
X = torch.zeros(2, 3, 4, 5)
M = torch.ones(2, 1, 4, 5)
SPARSE = torch.zeros(2, 3).to_sparse()
META = "meta"


def _images(**other):
    return {"fg": X, "bg": X, "target": X, **other}


def _plain(**other):
    return {"prediction": X, "target": X, **other}


def _mask(**other):
    return _images(**{"mask": M, **other})


def _logits(**other):
    return _images(**{"mask_logits": M, **other})


# (the argument that the message must name, function, arguments)
def _slots(**other):
    """Four slots of X."""
    k = 4
    call = {"slots": X.expand(k, *X.shape).transpose(0, 1), "target": X}
    return {**call, "mask_logits": torch.zeros(2, k, 1, 4, 5), **other}


BAD_CALLS = [
    # slots
    *[
        bad
        for op in (SLOTS, SLOT_BLEND)
        for bad in (
            ("slots", op, _slots(slots=None)),
            ("slots", op, _slots(slots=X[0])),
            ("slots", op, _slots(slots=torch.zeros(2, 0, 3, 4, 5))),
            ("slots", op, _slots(slots=torch.zeros(2, 4, 3, 4, 5, dtype=torch.int64))),
            ("target", op, _slots(target=X[:1])),
            ("target", op, _slots(target=X.long())),
            ("target", op, _slots(target=None)),
            ("mask_logits", op, _slots(mask_logits=None)),
            ("mask_logits", op, _slots(mask_logits=torch.zeros(2, 4, 2, 4, 5))),
            ("mask_logits", op, _slots(mask_logits=torch.zeros(2, 4, 1, 4, 5, dtype=torch.bool))),
            ("log_mask", op, _slots(log_mask=torch.zeros(2, 4, 1, 4, 5))),
            ("log_mask", op, _slots(mask_logits=None, log_mask=torch.zeros(2, 3, 1, 4, 5))),
            ("likelihood", op, _slots(likelihood="normal")),
            ("scale", op, _slots(scale=0.0)),
            ("scale", op, _slots(scale=torch.ones(5))),
            ("scale", op, _slots(scale=torch.ones(2, 7, 3, 4, 5))),
            ("weight", op, _slots(weight=torch.ones(2, 1, 4, 4))),
            ("weight", op, _slots(weight=torch.ones(2, 1, 4, 5, dtype=torch.int64))),
            ("weight", op, _slots(weight=1.0)),
            ("reduction", op, _slots(reduction="avg")),
            ("batch_dims", op, _slots(batch_dims=0)),
            ("batch_dims", op, _slots(batch_dims=1.5)),
            ("slots", op, _slots(batch_dims=3)),
        )
    ],
    ("mask_logits", SLOTS, _slots(mask_logits=torch.zeros(2, 4, 3, 4, 5))),
    ("weight", SLOTS, _slots(weight=torch.ones(2, 3, 4, 5))),
    ("channels", SLOTS, _slots(channels="both")),
    ("return_responsibilities", SLOTS, _slots(return_responsibilities=1)),
    # latents
    ("mu", DRAW, {"mu": None, "logvar": Z}),
    ("mu", DRAW, {"mu": "zeros", "logvar": Z}),
    ("mu", DRAW, {"mu": 0.0, "logvar": Z}),
    ("mu", DRAW, {"mu": Z.numpy(), "logvar": Z}),
    ("mu", DRAW, {"mu": Z.long(), "logvar": Z}),
    ("mu", KL, {"mu": Z.to(torch.complex64), "logvar": Z}),
    ("mu", KL, {"mu": Z.bool(), "logvar": Z}),
    ("mu", KL, {"mu": torch.tensor(0.0), "logvar": torch.tensor(0.0)}),
    ("mu", KL, {"mu": SPARSE, "logvar": Z}),
    ("logvar", DRAW, {"mu": Z, "logvar": None}),
    ("logvar", DRAW, {"mu": Z, "logvar": Z[:1]}),
    ("logvar", KL, {"mu": Z, "logvar": Z[:, :1]}),
    ("logvar", KL, {"mu": Z, "logvar": Z[0]}),
    ("logvar", KL, {"mu": Z, "logvar": Z.int()}),
    ("logvar", BOTH, {"mu": Z, "logvar": Z.to(META)}),
    ("logvar", BOTH, {"mu": Z, "logvar": Z[None]}),
    ("prior_mu", KL, {"mu": Z, "logvar": Z, "prior_mu": Z.T}),
    ("prior_mu", KL, {"mu": Z, "logvar": Z, "prior_mu": Z[None]}),
    ("prior_mu", KL, {"mu": Z, "logvar": Z, "prior_mu": "0"}),
    ("prior_mu", BOTH, {"mu": Z, "logvar": Z, "prior_mu": math.nan}),
    ("prior_mu", BOTH, {"mu": Z, "logvar": Z, "prior_mu": Z.to(META)}),
    ("prior_logvar", KL, {"mu": Z, "logvar": Z, "prior_logvar": Z.T}),
    ("prior_logvar", BOTH, {"mu": Z, "logvar": Z, "prior_logvar": Z.long()}),
    ("prior_logvar", KL, {"mu": Z, "logvar": Z, "prior_logvar": math.inf}),
    ("prior_logvar", KL, {"mu": Z, "logvar": Z, "prior_logvar": 0.0, "parameterization": "std"}),
    ("prior_logvar", BOTH, {"mu": Z, "logvar": Z, "prior_logvar": -1, "parameterization": "std"}),
    ("parameterization", DRAW, {"mu": Z, "logvar": Z, "parameterization": "sigma"}),
    ("parameterization", KL, {"mu": Z, "logvar": Z, "parameterization": None}),
    ("parameterization", BOTH, {"mu": Z, "logvar": Z, "parameterization": "logstd"}),
    ("parameterization", LOG_PROB, {"z": Z, "parameterization": 1}),
    ("batch_dims", KL, {"mu": Z, "logvar": Z, "batch_dims": 0}),
    ("batch_dims", KL, {"mu": Z, "logvar": Z, "batch_dims": 3}),
    ("batch_dims", BOTH, {"mu": Z, "logvar": Z, "batch_dims": 1.0}),
    ("batch_dims", BERNOULLI, {"logits": Z, "batch_dims": -1}),
    ("batch_dims", LOG_PROB, {"z": Z, "batch_dims": True}),
    ("batch_dims", CATEGORICAL, {"logits": Z, "batch_dims": 2}),
    # log-densities
    ("z", LOG_PROB, {"z": None}),
    ("z", LOG_PROB, {"z": Z.long()}),
    ("z", LOG_PROB, {"z": torch.tensor(1.0)}),
    ("mu", LOG_PROB, {"z": Z, "mu": None}),
    ("mu", LOG_PROB, {"z": Z, "mu": Z[:, :2]}),
    ("mu", LOG_PROB, {"z": Z[0], "mu": Z}),
    ("logvar", LOG_PROB, {"z": Z, "logvar": "1"}),
    ("logvar", LOG_PROB, {"z": Z, "logvar": Z.to(META)}),
    ("logvar", LOG_PROB, {"z": Z, "logvar": 0, "parameterization": "std"}),
    ("reduction", LOG_PROB, {"z": Z, "reduction": "avg"}),
    # categorical_kl
    ("logits", CATEGORICAL, {"logits": None}),
    ("logits", CATEGORICAL, {"logits": Z.long()}),
    ("logits", CATEGORICAL, {"logits": Z[0]}),
    ("logits", CATEGORICAL, {"logits": Z[:, :0]}),
    ("prior_logits", CATEGORICAL, {"logits": Z, "prior_logits": Z[:, :2]}),
    ("prior_logits", CATEGORICAL, {"logits": Z, "prior_logits": Z.bool()}),
    ("prior_logits", CATEGORICAL, {"logits": Z, "prior_logits": None}),
    ("prior_logits", CATEGORICAL, {"logits": Z, "prior_logits": math.inf}),
    ("dim", CATEGORICAL, {"logits": Z, "dim": 2}),
    ("dim", CATEGORICAL, {"logits": Z, "dim": -3}),
    ("dim", CATEGORICAL, {"logits": Z, "dim": 0}),
    ("dim", CATEGORICAL, {"logits": X, "dim": 1, "batch_dims": 2}),
    ("dim", CATEGORICAL, {"logits": Z, "dim": "1"}),
    ("reduction", CATEGORICAL, {"logits": Z, "reduction": None}),
    # seeds, offsets, draws
    ("seed", DRAW, {"mu": Z, "logvar": Z, "seed": 1.0}),
    ("seed", DRAW, {"mu": Z, "logvar": Z, "seed": "1"}),
    ("seed", DRAW, {"mu": Z, "logvar": Z, "seed": True}),
    ("seed", DRAW, {"mu": Z, "logvar": Z, "seed": 2**63}),
    ("seed", DRAW, {"mu": Z, "logvar": Z, "seed": torch.tensor([1, 2])}),
    ("seed", DRAW, {"mu": Z, "logvar": Z, "seed": torch.tensor([], dtype=torch.int64)}),
    ("seed", DRAW, {"mu": Z, "logvar": Z, "seed": torch.tensor([1.0])}),
    ("seed", BOTH, {"mu": Z, "logvar": Z, "seed": torch.tensor([1], dtype=torch.int32)}),
    ("seed", BOTH, {"mu": Z, "logvar": Z, "seed": torch.tensor([1], device=META)}),
    ("seed", BOTH, {"mu": Z, "logvar": Z, "seed": 1, "generator": torch.Generator()}),
    ("generator", DRAW, {"mu": Z, "logvar": Z, "generator": 3}),
    ("offset", DRAW, {"mu": Z, "logvar": Z, "offset": -1}),
    ("offset", DRAW, {"mu": Z, "logvar": Z, "offset": 1.5}),
    ("offset", DRAW, {"mu": Z, "logvar": Z, "offset": 2**63}),
    ("offset", BOTH, {"mu": Z, "logvar": Z, "offset": None}),
    ("num_samples", DRAW, {"mu": Z, "logvar": Z, "num_samples": 0}),
    ("num_samples", DRAW, {"mu": Z, "logvar": Z, "num_samples": -2}),
    ("num_samples", BOTH, {"mu": Z, "logvar": Z, "num_samples": 2.0}),
    ("num_samples", BOTH, {"mu": Z, "logvar": Z, "num_samples": True}),
    ("seed", NOISE, {"seed": None, "size": (2,)}),
    ("seed", NOISE, {"seed": 0.5, "size": (2,)}),
    ("seed", NOISE, {"seed": torch.zeros(2, dtype=torch.int64), "size": (2,)}),
    ("size", NOISE, {"seed": 1, "size": 3}),
    ("size", NOISE, {"seed": 1, "size": (2, -1)}),
    ("size", NOISE, {"seed": 1, "size": (2, 2**63)}),
    ("size", NOISE, {"seed": 1, "size": (2.0,)}),
    ("offset", NOISE, {"seed": 1, "size": (2,), "offset": -4}),
    ("dtype", NOISE, {"seed": 1, "size": (2,), "dtype": torch.int64}),
    ("dtype", NOISE, {"seed": 1, "size": (2,), "dtype": torch.complex64}),
    # reductions and free bits
    ("reduction", KL, {"mu": Z, "logvar": Z, "reduction": "avg"}),
    ("reduction", KL, {"mu": Z, "logvar": Z, "reduction": None}),
    ("reduction", KL, {"mu": Z, "logvar": Z, "reduction": "SUM"}),
    ("reduction", BERNOULLI, {"logits": Z, "reduction": 1}),
    ("reduction", MASKED, _mask(reduction="batch")),
    ("reduction", BLENDED, _mask(reduction="")),
    ("reduction", MIXTURE, _logits(reduction=torch.sum)),
    ("free_bits", KL, {"mu": Z, "logvar": Z, "free_bits": -0.1}),
    ("free_bits", KL, {"mu": Z, "logvar": Z, "free_bits": math.nan}),
    ("free_bits", KL, {"mu": Z, "logvar": Z, "free_bits": math.inf}),
    ("free_bits", KL, {"mu": Z, "logvar": Z, "free_bits": "0.5"}),
    ("free_bits", KL, {"mu": Z, "logvar": Z, "free_bits": None}),
    ("free_bits", KL, {"mu": Z, "logvar": Z, "free_bits": 0.5, "reduction": "sample"}),
    ("free_bits", BOTH, {"mu": Z, "logvar": Z, "free_bits": 0.5, "reduction": "none"}),
    # bernoulli_kl
    ("logits", BERNOULLI, {"logits": None}),
    ("logits", BERNOULLI, {"logits": Z.long()}),
    ("logits", BERNOULLI, {"logits": torch.tensor(1.0)}),
    ("prior_logits", BERNOULLI, {"logits": Z, "prior_logits": Z.T}),
    ("prior_logits", BERNOULLI, {"logits": Z, "prior_logits": None}),
    ("prior_logits", BERNOULLI, {"logits": Z, "prior_logits": math.nan}),
    ("prior_logits", BERNOULLI, {"logits": Z, "prior_logits": "0"}),
    ("prior_logits", BERNOULLI, {"logits": Z, "prior_logits": Z.bool()}),
    ("prior_logits", BERNOULLI, {"logits": Z, "prior_logits": Z.to(META)}),
    # images
    ("fg", MASKED, _mask(fg=None)),
    ("fg", MASKED, _mask(fg=X.byte())),
    ("fg", MASKED, _mask(fg=X[0, 0])),
    ("fg", BLENDED, _mask(fg=X[None, None])),
    ("bg", MASKED, _mask(bg=X[:, :1])),
    ("bg", MASKED, _mask(bg=1.0)),
    ("bg", BLENDED, _mask(bg=None)),
    ("bg", MIXTURE, _logits(bg=None)),
    ("bg", MIXTURE, _logits(bg=X.to(META))),
    ("target", MASKED, _mask(target=None)),
    ("target", MASKED, _mask(target=X.byte())),
    ("target", BLENDED, _mask(target=X[:1])),
    ("target", MIXTURE, _logits(target=X[..., :1])),
    ("target", MIXTURE, _logits(target=X.to(torch.complex64))),
    # masks
    ("mask", MASKED, _images()),
    ("mask", MASKED, _mask(mask_logits=M)),
    ("mask_logits", BLENDED, _images()),
    ("mask_logits", BLENDED, _mask(mask_logits=M)),
    ("mask", MASKED, _mask(mask=0.5)),
    ("mask", MASKED, _mask(mask=M[:, 0])),
    ("mask", MASKED, _mask(mask=M[:1])),
    ("mask", MASKED, _mask(mask=X[:, :2])),
    ("mask", BLENDED, _mask(mask=M[..., :1])),
    ("mask", BLENDED, _mask(mask=M.long())),
    ("mask", BLENDED, _mask(mask=M.to(META))),
    ("mask_logits", MASKED, _images(mask_logits=M.bool())),
    ("mask_logits", MASKED, _images(mask_logits=M.byte())),
    ("mask_logits", MASKED, _images(mask_logits=M[:1])),
    ("mask_logits", MIXTURE, _logits(mask_logits=None)),
    ("mask_logits", MIXTURE, _images(mask_logits=X)),
    ("mask_logits", MIXTURE, _images(mask_logits=X[:, :2], channels="independent")),
    ("mask_logits", MIXTURE, _images(mask_logits="logits")),
    # words, flags, numbers
    ("likelihood", MASKED, _mask(likelihood="normal")),
    ("likelihood", MASKED, _mask(likelihood=None)),
    ("likelihood", BLENDED, _mask(likelihood=torch.distributions.Normal)),
    ("likelihood", MIXTURE, _logits(likelihood="Gaussian")),
    ("channels", MIXTURE, _logits(channels="both")),
    ("channels", MIXTURE, _logits(channels=3)),
    ("normalize", MASKED, _mask(normalize="pixels")),
    ("normalize", MASKED, _mask(normalize=True)),
    ("return_terms", MASKED, _mask(return_terms=1)),
    ("return_terms", MASKED, _mask(return_terms="yes")),
    ("fg_weight", MASKED, _mask(fg_weight="1")),
    ("fg_weight", MASKED, _mask(fg_weight=math.inf)),
    ("fg_weight", MASKED, _mask(fg_weight=torch.tensor(1.0))),
    ("bg_weight", MASKED, _mask(bg_weight=None)),
    ("bg_weight", MASKED, _mask(bg_weight=1j)),
    # scales
    ("fg_scale", MASKED, _mask(fg_scale=0.0)),
    ("fg_scale", MASKED, _mask(fg_scale=-1.0)),
    ("fg_scale", MASKED, _mask(fg_scale=math.nan)),
    ("fg_scale", MASKED, _mask(fg_scale=None)),
    ("fg_scale", MASKED, _mask(fg_scale=torch.ones(2))),
    ("fg_scale", MASKED, _mask(fg_scale=torch.ones(1, 3))),
    ("fg_scale", MASKED, _mask(fg_scale=torch.ones(2, 3, 4, 4))),
    ("fg_scale", MASKED, _mask(fg_scale=torch.ones(1, 2, 3, 4, 5))),
    ("fg_scale", MASKED, _mask(fg_scale=torch.ones(4, 5, device=META))),
    ("fg_scale", MASKED, _mask(fg_scale=torch.ones(3, dtype=torch.int64))),
    ("fg_scale", MASKED, _mask(fg_scale=torch.ones(3, device=META))),
    ("fg_scale", MASKED, _mask(fg_scale=0.5, likelihood="bernoulli")),
    ("bg_scale", MASKED, _mask(bg_scale=-0.5, likelihood="laplace")),
    ("bg_scale", MASKED, _mask(bg_scale=torch.ones(3), likelihood="squared_error")),
    ("bg_scale", MIXTURE, _logits(bg_scale="1")),
    ("bg_scale", MIXTURE, _logits(bg_scale=torch.ones(4))),
    ("scale", BLENDED, _mask(scale=0)),
    ("scale", BLENDED, _mask(scale=True)),
    ("scale", BLENDED, _mask(scale=[1.0, 1.0, 1.0])),
    ("scale", BLENDED, _mask(scale=2.0, likelihood="absolute_error")),
    ("scale", PLAIN, _plain(scale=-1.0)),
    ("scale", PLAIN, _plain(scale=torch.ones(5, 4))),
    ("scale", PLAIN, _plain(scale=torch.ones(3), likelihood="poisson")),
    # weights
    ("weight", PLAIN, _plain(weight=1.0)),
    ("weight", PLAIN, _plain(weight=M.long())),
    ("weight", PLAIN, _plain(weight=M.to(META))),
    ("weight", PLAIN, _plain(weight=X[:, :2])),
    ("weight", PLAIN, _plain(weight=X[None])),
    ("weight", MASKED, _mask(weight="ones")),
    ("weight", MASKED, _mask(weight=M[..., :2])),
    ("weight", BLENDED, _mask(weight=M.to(torch.complex64))),
    ("weight", MIXTURE, _logits(weight=X)),
    # one image, and dimensions of samples
    ("prediction", PLAIN, _plain(prediction=None)),
    ("prediction", PLAIN, _plain(prediction=X.byte())),
    ("prediction", PLAIN, _plain(prediction=torch.tensor(1.0), target=torch.tensor(1.0))),
    ("target", PLAIN, _plain(target=X[0])),
    ("target", PLAIN, _plain(target=X[..., :2])),
    ("target", PLAIN, {"prediction": Z, "target": Z[0]}),
    ("target", PLAIN, {"prediction": Z, "target": Z[:, :1]}),
    ("target", PLAIN, {"prediction": Z, "target": None}),
    ("batch_dims", PLAIN, _plain(batch_dims=0)),
    ("batch_dims", PLAIN, _plain(batch_dims=1.0)),
    ("batch_dims", PLAIN, _plain(batch_dims=5)),
    ("batch_dims", MASKED, _mask(batch_dims=3)),
    ("batch_dims", BLENDED, _mask(batch_dims=True)),
    ("batch_dims", MIXTURE, _logits(batch_dims="2")),
    ("mask", MASKED, _mask(batch_dims=2, mask=M[0])),
    ("target", PLAIN, _plain(batch_dims=2, target=X[:1])),
    ("mask", MASKED, {n: t[None] for n, t in _mask(mask=M[:1]).items()} | {"batch_dims": 2}),
    ("target", SLOTS, {"slots": X[None, :, None], "target": X[None, :1], "log_mask": X[None, :, None, :1],
                       "batch_dims": 2}),
    # importance_weighted_bound
    ("log_p", BOUND, {"log_p": None, "log_q": Z}),
    ("log_q", BOUND, {"log_p": Z, "log_q": Z[:1]}),
    ("log_q", BOUND, {"log_p": Z, "log_q": Z.long()}),
    ("log_p", BOUND, {"log_p": SPARSE, "log_q": Z}),
    ("logvar", KL, {"mu": Z, "logvar": Z.to(torch.float8_e5m2), "free_bits": 0.5}),
    ("logvar", KL, {"mu": Z, "logvar": SPARSE, "free_bits": 0.5}),
    ("bg", MASKED, _mask(bg=X.to(torch.float8_e5m2), normalize="area", reduction="none")),
    ("dim", BOUND, {"log_p": Z, "log_q": Z, "dim": 2}),
    ("dim", BOUND, {"log_p": Z, "log_q": Z, "dim": 0.0}),
    ("bits_per_dim", BOUND, {"log_p": Z, "log_q": Z, "bits_per_dim": 0}),
]  # fmt: skip


def _show(value):
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype)[6:]}{list(value.shape)}"
    return value if isinstance(value, str) else None


def _move(value, device):
    moves = isinstance(value, torch.Tensor) and value.device.type != META
    return value.to(device) if moves else value


@pytest.mark.parametrize(("argument", "function", "arguments"), BAD_CALLS, ids=_show)
def test_bad_call(argument, function, arguments, device):
    """The message has the argument's name as a word, and says more than that."""
    arguments = {name: _move(value, device) for name, value in arguments.items()}
    if isinstance(arguments.get("generator"), torch.Generator):
        arguments["generator"] = torch.Generator(device)
    with pytest.raises((ValueError, TypeError), match=rf"\b{argument}\b") as caught:
        function(**arguments)
    assert type(caught.value) in (ValueError, TypeError)
    assert len(str(caught.value)) > len(argument) + 15


def test_there_are_many_bad_calls():
    assert len(BAD_CALLS) >= 60


@pytest.mark.parametrize(
    "function",
    [DRAW, KL, BOTH, BERNOULLI, LOG_PROB, CATEGORICAL, PLAIN, MASKED, BLENDED, MIXTURE, SLOTS, SLOT_BLEND],
    ids=lambda f: f.__name__,
)
def test_every_argument_has_a_bad_call(function):
    """A new argument comes with its own."""
    import inspect

    parameters = set(inspect.signature(function).parameters)
    tried = {argument for argument, _, _ in BAD_CALLS}
    assert parameters <= tried


def test_the_ops_check_for_themselves(device):
    """Callers of torch.ops get an error too, not memory that is not theirs."""
    z, seed = Z.to(device), torch.tensor([1], device=device)
    ops = torch.ops.fgbg
    bad = [
        lambda: ops.gaussian_kl(z, z[:1], None, None, "logvar", "sum", 1),
        lambda: ops.gaussian_kl(z, z, z[:, :2], None, "logvar", "sum", 1),
        lambda: ops.gaussian_kl(z, z, None, None, "logvar", "total", 1),
        lambda: ops.gaussian_kl(z, z, None, None, "sigma", "sum", 1),
        lambda: ops.gaussian_kl(z, z, None, None, "logvar", "sum", 3),
        lambda: ops.gaussian_kl(z.long(), z, None, None, "logvar", "sum", 1),
        lambda: ops.reparameterize(z, z, "logvar", torch.tensor([1, 2], device=device), 0, None),
        lambda: ops.reparameterize(z, z, "logvar", seed.int(), 0, None),
        lambda: ops.gaussian_log_prob(z[0], z, None, "logvar", "sum", 1),
        lambda: ops.bernoulli_kl(z, z[:, :2], "sum", 1),
        lambda: ops.bernoulli_kl(z, z[0, 0].int(), "sum", 1),
        lambda: ops.categorical_kl(z, None, 0, "sum", 1),
        lambda: ops.categorical_kl(z, None, 2, "sum", 1),
        lambda: ops.categorical_kl(z, z[None], 1, "sum", 1),
        lambda: ops.gaussian_kl(z[(None,) * 4], z[(None,) * 4], None, None, "logvar", "sum", 1),
    ]
    for call in bad:
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            call()


def test_a_dim_that_there_is_not_is_named_as_it_was_given(device):
    for dim in (2, -3):
        with pytest.raises(ValueError, match=f"dim is {dim}, expected a dimension"):
            CATEGORICAL(Z.to(device), dim=dim)


NUMBERS = [
    0.5,
    np.float32(0.5),
    np.float64(0.5),
    np.float16(0.5),
    np.array(0.5),
    Fraction(1, 2),
    1,
    np.int64(1),
]


def test_shapes_that_were_merged_are_told_as_such(device):
    """The kernels know one dimension of samples: what is said of them names another shape than came."""
    clips, other = (torch.zeros(2, 3, 4, 5, n, device=device) for n in (5, 6))
    with pytest.raises(ValueError, match=r"target has shape \[6, 4, 5, 6\].*dimensions of samples"):
        fgbg_cuda.reconstruction_loss(clips, other, batch_dims=2)
    slots, mask = clips[:, :, :, None], torch.zeros(2, 3, 4, 1, 5, 6, device=device)
    with pytest.raises(ValueError, match=r"mask_logits has shape \[6, 4, 1, 5, 6\].*dimensions of samples"):
        fgbg_cuda.slot_mixture_loss(slots, clips[:, :, :1], mask_logits=mask, batch_dims=2)
    with pytest.raises(ValueError, match=r"likelihood .*[^)]$"):
        fgbg_cuda.reconstruction_loss(clips, clips, likelihood="normal", batch_dims=2)


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
def test_what_is_a_number(number, device):
    """NumPy's scalars and whatever else says what float it is."""
    x, m, z = X.to(device), M.to(device), Z.to(device)
    loss = MASKED(x + 1, x, x, mask=m, fg_scale=number, bg_scale=number, fg_weight=number)
    assert_close(loss, MASKED(x + 1, x, x, mask=m, fg_scale=float(number), fg_weight=float(number)))
    assert_close(
        BLENDED(x + 1, x, x, mask=m, scale=number), BLENDED(x + 1, x, x, mask=m, scale=float(number))
    )
    assert_close(BERNOULLI(z, number), BERNOULLI(z, float(number)))
    assert_close(KL(z, z, free_bits=number), torch.tensor(3 * float(number), device=device))


@pytest.mark.parametrize("integer", [3, np.int64(3), np.int32(3), np.uint8(3)], ids=repr)
def test_what_is_an_integer(integer, device):
    z = Z.to(device)
    for found, expected in (
        (DRAW(z, z, seed=integer), DRAW(z, z, seed=3)),
        (DRAW(z, z, seed=1, offset=integer), DRAW(z, z, seed=1, offset=3)),
        (BOTH(z, z, seed=1, num_samples=integer)[0], BOTH(z, z, seed=1, num_samples=3)[0]),
        (NOISE(integer, (integer, 2)), NOISE(3, (3, 2))),
    ):
        assert_same(found, expected)


class Strange:
    __repr__ = lambda self: "Strange()"  # noqa: E731

    def __float__(self):
        raise TypeError("not today")


@pytest.mark.parametrize(
    "value",
    [
        np.bool_(True),
        True,
        np.array([0.5]),
        np.array([0.5, 1.0]),
        np.complex64(1),
        1j,
        "1",
        None,
        [1.0],
        Strange(),
    ],
    ids=repr,
)
def test_what_is_no_number(value, device):
    x, m = X.to(device), M.to(device)
    with pytest.raises(TypeError, match="fg_weight must be a number, got"):
        MASKED(x, x, x, mask=m, fg_weight=value)
    with pytest.raises(TypeError, match="scale must be a number, got"):
        BLENDED(x, x, x, mask=m, scale=value)


@pytest.mark.parametrize("value", [np.bool_(True), True, np.array([1, 2]), np.float64(1), 1.0, "1"], ids=repr)
def test_what_is_no_integer(value, device):
    z = Z.to(device)
    for name in ("seed", "offset", "num_samples"):
        with pytest.raises(TypeError, match=f"{name} must be an integer"):
            DRAW(z, z, **{name: value})


@pytest.mark.parametrize("likelihood", ["bernoulli", "squared_error"])
def test_a_scale_of_one_is_no_error_where_there_is_none(likelihood, device):
    """It is the default."""
    x, m = X.to(device), M.to(device)
    loss = MASKED(x, x, x, mask=m, likelihood=likelihood, fg_scale=1.0, bg_scale=1)
    assert loss.isfinite()
