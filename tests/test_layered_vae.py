"""The layered VAE's options: each does what it says, in any combination, with any networks."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Laplace, Normal, kl_divergence

L = pytest.importorskip("lightning")
pytest.importorskip("skimage")

from fgbg_cuda.vae import (  # noqa: E402
    CellNetworks,
    CellsDecoder,
    CellsEncoder,
    CellsUnderDisc,
    LayeredVAE,
    LayeredVAEModule,
    Networks,
    ObjectNetworks,
    ScatteredLightDecoder,
    ScatteredLightEncoder,
)
from fgbg_cuda.vae.models.layered import COMPOSITIONS, LIKELIHOODS  # noqa: E402
from fgbg_cuda.vae.models.local_tones import local_tones  # noqa: E402
from fgbg_cuda.vae.models.object_networks import contrast  # noqa: E402

SIZE = (24, 30)
SHAPE = (1, 60, 60)  # of the cells


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


class Given(Networks):
    size_multiple = 1

    def __init__(self, *networks: torch.nn.Module) -> None:
        self.networks = networks

    def build(self, shape, likelihood):
        return self.networks


def for_cells(composition="mixture", likelihood="bernoulli", latents=2, **options) -> LayeredVAE:
    if composition == "masked":
        options.setdefault("mask_prior", 0.2)
    return LayeredVAE(
        composition=composition,
        likelihood=likelihood,
        shape=(1, *SIZE),
        networks=Given(
            CellsEncoder(latents=latents, width=4, size=SIZE),
            CellsDecoder(latents=latents, width=4, size=SIZE),
            ScatteredLightEncoder(size=SIZE),
            ScatteredLightDecoder(size=SIZE),
        ),
        **options,
    )


def images(count: int = 3) -> torch.Tensor:
    return (torch.rand(count, 1, *SIZE) < 0.3).float()


# ---- likelihoods ----


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_reconstruction_against_torch_distributions(composition, likelihood, additive):
    model = for_cells(composition, likelihood, additive=additive).double()
    x = images().double()
    out = model(x)
    m = out.mask_logits.sigmoid()

    def log_p(layer, scale=None):
        if likelihood == "bernoulli":
            return Bernoulli(logits=layer).log_prob(x)
        return {"gaussian": Normal, "laplace": Laplace}[likelihood](layer, scale).log_prob(x)

    scales = (model.fg_scale, model.bg_scale) if model.has_scales else (None, None)
    fg, bg = log_p(out.foreground, scales[0]), log_p(out.background, scales[1])
    expected = {
        "mixture": lambda: torch.logaddexp(m.log() + fg, (1 - m).log() + bg),
        "masked": lambda: m * fg + (1 - m) * bg,
        "blended": lambda: log_p(m * out.foreground + (1 - m) * out.background, scales[1]),
    }[composition]()
    torch.testing.assert_close(model.reconstruction(out, x), -expected.flatten(1).sum(1))
    if composition == "masked":
        kl = kl_divergence(Bernoulli(m), Bernoulli(torch.tensor(0.2).double())).flatten(1).sum(1)
        torch.testing.assert_close(model.mask_kl(out), kl, rtol=1e-6, atol=1e-8)


def test_additive_foreground_comes_on_top_of_the_background():
    occluding, adding = (for_cells(additive=additive) for additive in (False, True))
    adding.load_state_dict(occluding.state_dict())
    x = images()
    a, b = occluding(x, sample=False), adding(x, sample=False)
    torch.testing.assert_close(b.foreground, a.foreground + a.background)
    assert torch.equal(a.background, b.background)


def test_the_mask_bound_is_below_the_sum_over_masks():
    """What "masked" bounds is the mixture with ``mask_prior`` as its prior, reached at the right mask."""
    model, x = for_cells("masked").double(), images().double()
    out = model(x)
    prior = torch.full_like(out.mask_logits, math.log(0.2 / 0.8))
    mixture = for_cells("mixture").double()
    exact = mixture.reconstruction(out._replace(mask_logits=prior), x)
    assert (model.reconstruction(out, x) + model.mask_kl(out) > exact).all()
    fg, bg = (Bernoulli(logits=t).log_prob(x) for t in (out.foreground, out.background))
    best = out._replace(mask_logits=prior + fg - bg)
    torch.testing.assert_close(model.reconstruction(best, x) + model.mask_kl(best), exact)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_explaining_away_standardises_what_the_background_leaves(likelihood):
    model = for_cells(likelihood=likelihood, explain_away=True).double()
    background = torch.randn(2000, 1, 4, 4).double()
    if likelihood == "bernoulli":
        x = Bernoulli(logits=background).sample()
    else:
        x = {"gaussian": Normal, "laplace": Laplace}[likelihood](background, model.bg_scale).sample()
    left = model._unexplained(x, background)
    # 32000 draws; the fourth moment of a standardised Bernoulli is large where it is rare.
    assert left.mean().abs() < 0.03
    assert left.var().item() == pytest.approx(1, abs=0.1)


def test_explaining_away_takes_the_background_out_of_the_foregrounds_sight():
    model, x = for_cells(explain_away=True), images()
    seen = []
    model.fg_encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    out = model(x, sample=False)
    p = out.background.sigmoid()
    torch.testing.assert_close(seen[0], (x - p) / (p * (1 - p)).sqrt())
    blind = for_cells()
    blind.fg_encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    blind(x)
    assert seen[1] is x


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_layers_of_a_separation_are_images(composition, likelihood):
    model, x = for_cells(composition, likelihood, additive=True, explain_away=True), images()
    found = model.separate(x)
    for layer in (found.foreground, found.background, found.mask, found.composite):
        assert layer.shape == x.shape
        assert layer.isfinite().all()
    if likelihood == "bernoulli":
        assert min(layer.min() for layer in found) >= 0
        assert max(layer.max() for layer in found) <= 1


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_over_a_dark_background_an_additive_foreground_by_itself_is_the_composite(composition, likelihood):
    class Dark(torch.nn.Module):
        def forward(self, z):
            return z.new_full((len(z), 1, *SIZE), -2.5)

    model, x = for_cells(composition, likelihood, additive=True), images()
    model.bg_decoder = Dark()
    found = model.separate(x)
    torch.testing.assert_close(found.foreground, found.composite)
    assert found.foreground.std() > 0


# ---- learned scales ----


class Still(torch.nn.Module):
    """Networks that say the same of every image, so that the scales are all there is to learn."""

    def __init__(self, *said: torch.Tensor) -> None:
        super().__init__()
        self.said = said

    def forward(self, x):
        said = tuple(value.expand(len(x), *value.shape) for value in self.said)
        return said if len(said) > 1 else said[0]


class Encoders(torch.nn.Module):
    def __init__(self, *encoders: torch.nn.Module) -> None:
        super().__init__()
        self.encoders = torch.nn.ModuleList(encoders)

    def forward(self, x):
        return tuple(encoder(x) for encoder in self.encoders)


def known_layers(composition, likelihood="gaussian") -> tuple[LayeredVAE, torch.Tensor]:
    """RGB, the foreground on the left half; and the mask of it."""
    mask = torch.zeros(1, 32, 32).double()
    mask[..., :16] = 1
    foreground, background = torch.full((2, 3, 32, 32), 0.7).double()
    prior = Still(torch.zeros(1).double(), torch.zeros(1).double())
    model = LayeredVAE(
        (3, 32, 32),
        composition=composition,
        likelihood=likelihood,
        mask_prior=0.5 if composition == "masked" else None,
        learn_fg_scale=True,
        networks=Given(Encoders(prior), Still(foreground, 2000 * mask - 1000), prior, Still(background)),
    ).double()
    return model, mask


@pytest.mark.parametrize("composition", ["mixture", "masked"])
@pytest.mark.parametrize("likelihood", ["gaussian", "laplace"])
def test_learned_scales_become_those_of_the_noise(composition, likelihood):
    model, mask = known_layers(composition, likelihood)
    fg_scale = torch.tensor([0.02, 0.05, 0.4]).double()
    bg_scale = torch.tensor([0.1, 0.3, 0.03]).double()
    scale = torch.where(mask > 0, fg_scale[:, None, None], bg_scale[:, None, None])
    draw = {"gaussian": Normal, "laplace": Laplace}[likelihood]
    x = draw(torch.full_like(scale, 0.7), scale).sample((16,))
    optimizer = torch.optim.LBFGS(
        [model.log_fg_scale, model.log_bg_scale], max_iter=200, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        nats = model.reconstruction(model(x), x).mean() / x[0].numel()
        nats.backward()
        return nats

    optimizer.step(loss)
    # 8192 pixels in each half: the standard deviation of the best estimate is 0.8 % (Gaussian, 1 / sqrt(2 n))
    # or 1.1 % (Laplace, 1 / sqrt(n)). Five of the larger.
    torch.testing.assert_close(model.fg_scale, fg_scale, rtol=0.055, atol=0)
    torch.testing.assert_close(model.bg_scale, bg_scale, rtol=0.055, atol=0)


def test_learned_scales_stay_positive():
    """Layers without any noise pull both scales towards 0 for ever; a few steps would take them below."""
    model, mask = known_layers("mixture")
    model.float()
    x = torch.full((2, 3, 32, 32), 0.7)
    model.fg_decoder, model.bg_decoder = Still(x[0], 2000 * mask.float() - 1000), Still(x[0])
    optimizer = torch.optim.Adam([model.log_fg_scale, model.log_bg_scale], lr=0.5)
    for _ in range(40):
        optimizer.zero_grad()
        loss = model.reconstruction(model(x), x).mean()
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    for scale in (model.fg_scale, model.bg_scale):
        assert ((scale > 0) & (scale < 1e-6)).all()


def test_a_learned_scale_that_is_not_finite_is_named():
    module = LayeredVAEModule(networks=ObjectNetworks(width=4), learn_fg_scale=True)
    x = torch.rand(2, 1, 32, 32)
    module.model.log_fg_scale.data.fill_(math.nan)
    assert module._non_finite_term(module.model(x), x) == "the foreground scale has NaN or infinite values"


def test_the_terms_are_logged_when_the_logger_writes(tmp_path, monkeypatch):
    module, steps = LayeredVAEModule(**CELLS), []

    def log_dict(metrics, **options):
        if "train/kl_fg" in metrics:
            steps.append(module.global_step)

    monkeypatch.setattr(module, "log_dict", log_dict)
    fit(tmp_path, module, 2, log_every_n_steps=2)  # of 3 batches each
    assert steps == [1, 3, 5]


def test_the_foregrounds_scale_is_learned_after_its_warm_up(tmp_path):
    used = []

    class Record(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            used.append(trainer.callback_metrics["train/fg_scale"].item())

    options = {"networks": CellNetworks(cell_width=8), "shape": SHAPE, "fg_scale": 0.1, "fg_scale_start": 0.4}
    module = LayeredVAEModule(learn_fg_scale=True, **options)
    trainer, _ = fit(tmp_path, module, 4, [Record()])  # of 3 batches each
    assert used[:6] == pytest.approx([0.4 * 0.25 ** (step / 6) for step in range(6)])
    assert all(a != b for a, b in itertools.pairwise(used[6:]))
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    loaded = LayeredVAEModule.load_from_checkpoint(tmp_path / "some.ckpt", weights_only=True)
    assert torch.equal(loaded.model.fg_scale, module.model.fg_scale)


@pytest.mark.parametrize("learn", [False, True])
def test_without_a_warm_up_the_foregrounds_scale_starts_as_given(tmp_path, learn):
    module = LayeredVAEModule(
        networks=CellNetworks(cell_width=4), shape=SHAPE, fg_scale=0.1, scale_warmup=0.0, learn_fg_scale=learn
    )
    fit(tmp_path, module, 1)
    assert (module.model.fg_scale.item() == pytest.approx(0.1, rel=1e-6)) != learn
    # Adam moves a parameter by about lr in a step, here the scale's logarithm in 3 steps.
    assert module.model.fg_scale.log().item() == pytest.approx(math.log(0.1), abs=5 * module.hparams.lr)


# ---- the objective's options ----


class Masked(NamedTuple):
    image: torch.Tensor
    mask: torch.Tensor


def loss_and_terms(x, weight=1.0, batch=None, seed=0, **options):
    torch.manual_seed(0)
    module = LayeredVAEModule(
        networks=CellNetworks(cell_latents=8, cell_width=4),
        shape=(1, *SIZE),
        likelihood="bernoulli",
        **options,
    )
    torch.manual_seed(seed)
    out = module.model(x)
    return (*module.objective(out, x if batch is None else batch, weight), out)


def test_beta_and_warm_up_weigh_the_kl():
    x = images()
    loss, terms, _ = loss_and_terms(x)
    kl = terms["kl_fg"] + terms["kl_bg"]
    for beta, weight in ((1, 0.25), (4, 1), (2, 0.5)):
        other, _, _ = loss_and_terms(x, weight, beta=beta)
        torch.testing.assert_close(other, loss + (beta * weight - 1) * kl)


def test_free_bits_leave_cheap_latents_alone():
    x = images()
    plain, terms, out = loss_and_terms(x)
    floored, same_terms, _ = loss_and_terms(x, free_bits=0.3)
    expected = sum(
        kl_divergence(Normal(q.mu, (q.logvar / 2).exp()), Normal(0, 1)).mean(0).clamp(min=0.3).sum()
        for q in (*out.z_fg, *out.z_bg)
    )
    torch.testing.assert_close(floored - terms["reconstruction"], expected, rtol=1e-4, atol=1e-3)
    assert floored > plain
    assert same_terms["kl_fg"] == terms["kl_fg"]  # what is logged is the plain KL


def test_mask_prior_enters_the_loss_and_the_elbo():
    x = images()
    plain, _, _ = loss_and_terms(x, composition="blended")
    loss, terms, out = loss_and_terms(x, composition="blended", mask_prior=0.1)
    torch.testing.assert_close(loss, plain + terms["kl_mask"])
    module = LayeredVAEModule(
        networks=CellNetworks(cell_latents=8, cell_width=4),
        shape=(1, *SIZE),
        composition="blended",
        likelihood="bernoulli",
        mask_prior=0.1,
    )
    torch.testing.assert_close(-module.elbo(out, x).mean(), loss)


def test_supervised_loss_is_that_of_image_and_mask():
    x = images()
    mask = torch.rand(len(x), 1, *SIZE) < 0.2
    loss, terms, out = loss_and_terms(x, batch=Masked(x, mask), supervised=True)
    fg, bg = (Bernoulli(logits=t).log_prob(x) for t in (out.foreground, out.background))
    log_p = torch.where(mask, fg, bg) + Bernoulli(logits=out.mask_logits).log_prob(mask.float())
    torch.testing.assert_close(terms["reconstruction"], -log_p.flatten(1).sum(1).mean())
    torch.testing.assert_close(loss, terms["reconstruction"] + out.kl_fg.mean() + out.kl_bg.mean())


def test_supervision_needs_masks():
    with pytest.raises(ValueError, match="supervised: a batch needs a field mask, got a Tensor"):
        loss_and_terms(images(), supervised=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"composition": "sum"}, "composition is 'sum', expected one of mixture, masked, blended"),
        ({"likelihood": "poisson"}, "likelihood is 'poisson', expected one of gaussian, laplace, bernoulli"),
        ({"composition": "masked"}, "mask_prior is None, but the composition 'masked' needs a prior"),
        ({"composition": "mixture", "mask_prior": 0.1}, "'mixture' has a prior already"),
        ({"composition": "masked", "mask_prior": 1.0}, "mask_prior is 1.0, expected a probability"),
        ({"likelihood": "bernoulli"}, "takes logits, but ObjectNetworks give intensities"),
        ({"fg_scale": 0.0}, "fg_scale is 0.0, expected a positive number"),
        (
            {"networks": CellNetworks(), "shape": (1, 60, 60), "prune": -0.1},
            "prune is -0.1, expected at least 0",
        ),
        (
            {"learn_fg_scale": True, "composition": "blended"},
            "learn_fg_scale: the composition 'blended' has no scale of the foreground",
        ),
        (
            {"learn_fg_scale": True, "likelihood": "bernoulli"},
            "learn_fg_scale: the likelihood 'bernoulli' has no scale of the foreground",
        ),
        ({"prune": 0.1}, "prune is 0.1, but ForegroundEncoder cannot be pruned"),
        ({"lr": 0.0}, "lr is 0.0, expected a positive number"),
        ({"beta": -1.0}, "beta is -1.0, expected at least 0"),
    ],
)
def test_bad_options_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        LayeredVAEModule(**options)


# ---- networks ----


def test_a_foreground_latent_is_local_and_a_background_latent_is_not():
    encoder, decoder = CellsEncoder(latents=1), CellsDecoder(latents=1)
    x = torch.zeros(1, 1, 60, 60, requires_grad=True)
    seen = torch.autograd.grad(encoder(x)[0][0][0, 0, 5, 5], x)[0][0, 0]
    rows, columns = seen.nonzero(as_tuple=True)
    assert max(rows.max() - rows.min(), columns.max() - columns.min()) < 16
    z = torch.zeros(1, 1, 10, 10)
    moved = z.clone()
    moved[0, 0, 5, 5] = 1
    rows, columns = (decoder(moved)[1] - decoder(z)[1])[0, 0].abs().gt(1e-6).nonzero(as_tuple=True)
    assert max(rows.max() - rows.min(), columns.max() - columns.min()) < 30
    background = ScatteredLightDecoder()
    change = background(torch.ones(1, 2)) - background(torch.zeros(1, 2))
    assert change.abs().gt(1e-6).float().mean() > 0.9


def test_sizes_that_do_not_fit_are_refused():
    for network in (CellsEncoder, CellsDecoder, ScatteredLightEncoder):
        with pytest.raises(ValueError, match="size is 60 x 64, expected multiples of 6"):
            network(size=(60, 64))
    for encoder in (CellsEncoder(size=SIZE), ScatteredLightEncoder(size=SIZE)):
        with pytest.raises(ValueError, match=r"x has shape \[1, 1, 30, 24\].* made for 24 x 30"):
            encoder(torch.zeros(1, 1, 30, 24))


def test_background_is_smooth():
    low = ScatteredLightDecoder()(torch.randn(1, 2))
    step = low.diff(dim=-1).abs().max()
    # Bilinear from 20 to 60 pixels: the difference of two drawn values is spread over three steps.
    assert step <= (low.max() - low.min()) / 3 + 1e-6


def test_latents_that_say_nothing_draw_nothing():
    decoder = CellsDecoder(latents=2, size=SIZE)
    logits = decoder(torch.zeros(3, 2, 4, 5))[1]
    torch.testing.assert_close(logits, torch.full_like(logits, -6.0))
    assert decoder(torch.randn(3, 2, 4, 5))[1].std() > 0


def test_pruned_latents_are_exactly_the_prior():
    encoder, x = CellsEncoder(latents=2, width=4, size=SIZE), images()
    for _ in range(5):
        encoder(x)
    least = encoder.kl.median().item()
    encoder.prune(least)
    assert 0 < encoder.used.sum() < encoder.used.numel()
    mu, logvar = encoder(x)[0]
    off = encoder.used.expand_as(mu) == 0
    assert (mu[off] == 0).all()
    assert (logvar[off] == 0).all()
    assert (mu[~off] != 0).all()
    encoder.prune(0.0)  # once off, off for good
    assert ((encoder(x)[0][0] == 0) == off).all()


def test_pruning_is_for_the_last_third(tmp_path):
    counts = []

    class Count(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            counts.append(int(module.model.fg_encoder.used.sum()))

    module = LayeredVAEModule(
        networks=CellNetworks(cell_width=4), shape=SHAPE, likelihood="bernoulli", prune=1e9
    )
    fit(tmp_path, module, epochs=3, callbacks=[Count()])
    assert counts == [100, 100, 0]


# ---- training ----


def fit(tmp_path, module, epochs, callbacks=(), data=None, log_every_n_steps=1):
    data = data or CellsUnderDisc("X50", train=60, val=10, test=10, batch_size=20)
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=log_every_n_steps,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
    )
    trainer.fit(module, datamodule=data)
    return trainer, data


CELLS = {"networks": CellNetworks(cell_width=8), "shape": SHAPE, "likelihood": "bernoulli", "additive": True}


@pytest.mark.parametrize(
    "options",
    [
        {**CELLS, "explain_away": True, "kl_warmup": 0.0, "prune": 0.3},
        {**CELLS, "composition": "masked", "mask_prior": 0.05, "free_bits": 0.01},
        {**CELLS, "composition": "blended", "supervised": True, "beta": 2.0},
        {"networks": CellNetworks(8, 8), "shape": SHAPE, "likelihood": "laplace", "explain_away": True},
    ],
    ids=["reproduction", "masked", "supervised", "laplace"],
)
def test_training_lowers_the_loss_and_the_checkpoint_says_the_same(tmp_path, options):
    L.seed_everything(0)
    losses = []

    class Record(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            losses.append(outputs["loss"].item())

    module = LayeredVAEModule(lr=5e-3, **options)
    trainer, data = fit(tmp_path, module, 4, [Record()])
    assert sum(losses[-3:]) < sum(losses[:3])
    scores = trainer.test(module, datamodule=data, verbose=False)[0]
    assert set(scores) == {f"test/{name}" for name in ("elbo", "mask", "iou", "dice", "fg_mse", "bg_mse")}
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    loaded = LayeredVAEModule.load_from_checkpoint(tmp_path / "some.ckpt", weights_only=True)
    image = data.splits["test"].image
    module.eval()
    loaded.eval()
    assert all(torch.equal(a, b) for a, b in zip(module.separate(image), loaded.separate(image), strict=True))


@pytest.mark.parametrize("kind", ["tensors", "tuples"])
def test_images_without_any_truth_train_too(tmp_path, kind):
    x = (torch.rand(8, 1, 60, 60) < 0.3).float()
    dataset = x if kind == "tensors" else torch.utils.data.TensorDataset(x)
    loader = torch.utils.data.DataLoader(dataset, batch_size=4)
    module = LayeredVAEModule(**CELLS)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    before = [p.clone() for p in module.parameters()]
    trainer.fit(module, loader, loader)
    assert any(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert "val/elbo" in trainer.callback_metrics
    assert "val/iou" not in trainer.callback_metrics


@pytest.mark.parametrize(("tone", "bright"), [("auto", False), ("bright", True), ("dark", False)])
def test_a_tone_that_is_given_is_not_searched_for(tone: str, bright: bool):
    x = torch.full((4, 1, 32, 32), 0.6)
    x[..., ::7, ::7] = 0.1
    networks = ObjectNetworks(width=8, tone=tone)
    model = LayeredVAE(shape=(1, 32, 32), networks=networks)
    networks.start(model, x, lambda sign: sign)
    assert (model.fg_decoder.tone[-1].bias > 0).all() == bright


@pytest.mark.parametrize("texture", ["grass", "gravel", "brick"])
@pytest.mark.parametrize("height", [0.15, 0.3])
@pytest.mark.parametrize("radius", [6, 16])
def test_a_flat_object_is_bright_or_dark_whatever_the_skewness_of_the_texture(texture, height, radius):
    pytest.importorskip("skimage")
    from fgbg_cuda.vae.data.scenes import _photograph

    rng = np.random.default_rng(1)
    y, x = np.indices((64, 64))
    images = np.stack([0.7 * _photograph(texture, 64, 64, 1, rng)[..., 0] for _ in range(32)])
    for image, (cy, cx) in zip(images, rng.uniform(16, 48, (32, 2)), strict=True):
        image[(y - cy) ** 2 + (x - cx) ** 2 < radius**2] = image.mean() + height
    images += 0.02 * rng.standard_normal(images.shape)
    bright = torch.from_numpy(images.astype(np.float32))[:, None]
    assert contrast(bright, 32) > 0
    assert contrast(1 - bright, 32) < 0
    tiny = bright[..., :3, :4]
    assert torch.isfinite(contrast(tiny, 8))


@pytest.mark.parametrize("cell", [8, 16, 32])
@pytest.mark.parametrize("noise", [0.005, 0.02])
@pytest.mark.parametrize("shape", ["line", "dot"])
@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_thin_object_is_bright_or_dark_too(cell, noise, shape, width):
    rng = np.random.default_rng(0)
    images = np.full((32, 64, 64), 0.5)
    for image, (top, left) in zip(images, rng.integers(4, 60, (32, 2)), strict=True):
        image[top : top + width, slice(None) if shape == "line" else slice(left, left + width)] = 0.8
    images += noise * rng.standard_normal(images.shape)
    bright = torch.from_numpy(images.astype(np.float32))[:, None]
    assert contrast(bright, cell) > 0
    assert contrast(1 - bright, cell) < 0


def crowd_of_discs(bright: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """An image [1, 1, 64, 64] of blurred discs, the dimmest of a sixth of the contrast, and their masks."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    levels = torch.tensor([0.1, 0.15, 0.3, 0.6, 0.1, 0.3])
    centres = torch.tensor([(12, 12), (12, 34), (12, 54), (38, 14), (38, 36), (52, 56)], dtype=torch.float32)
    discs = torch.stack([(y - a) ** 2 + (x - b) ** 2 < 8.5**2 for a, b in centres])
    light = (discs * levels[:, None, None]).sum(0)[None, None]
    light = torch.nn.functional.avg_pool2d(light, 3, stride=1, padding=1, count_include_pad=False)
    noise = 0.01 * torch.randn(light.shape, generator=torch.Generator().manual_seed(0))
    image = 0.1 + light + noise
    return (image if bright else 1 - image), discs.any(0)[None, None]


@pytest.mark.parametrize("bright", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_local_tones_find_dim_objects_beside_bright_ones_to_the_half_of_their_height(bright, channels):
    image, truth = crowd_of_discs(bright)
    x = image.expand(1, channels, -1, -1)
    background = torch.full_like(x, 0.1 if bright else 0.9)
    tone = torch.full_like(x, 0.7 if bright else 0.3)
    mask, tones = local_tones(x, background, tone, 4.0)
    found = mask > 0.5
    eroded = -torch.nn.functional.max_pool2d(-truth.float(), 3, stride=1, padding=1)
    rim = truth & (eroded == 0)
    assert (found != truth).sum() < rim.sum() / 2  # boundaries are right to half a pixel
    assert found[eroded == 1].all()
    assert (tones - x).abs()[..., 38, 14].max() < 0.1  # the tone of that object, and not of the others
    assert (tones - x).abs()[..., 12, 12].max() < 0.05


def test_an_image_of_nothing_but_background_has_no_objects():
    noise = 0.03 * torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    background, tone = torch.full_like(noise, 0.3), torch.full_like(noise, 0.8)
    mask, _ = local_tones(background + noise, background, tone, 4.0)
    assert (mask > 0.5).float().mean() < 0.01


def test_networks_of_many_objects_make_the_masks_of_local_tones():
    x, _ = crowd_of_discs(bright=True)
    model = LayeredVAE(shape=(1, 64, 64), networks=ObjectNetworks(width=8, bg_cell=32, objects="many"))
    out = model(x, sample=False)
    mask, tones = local_tones(x, out.background, out.foreground, reach=4.0)
    found = model.separate(x)
    torch.testing.assert_close(found.mask, mask, rtol=0, atol=0)
    torch.testing.assert_close(found.foreground, mask * tones, rtol=0, atol=0)
    with pytest.raises(ValueError, match="objects is 'few', expected one or many"):
        ObjectNetworks(objects="few")
