"""The double-ELBO model of the thesis: its layers, its loss, its options, its training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Bernoulli, Normal, kl_divergence

L = pytest.importorskip("lightning")
pytest.importorskip("skimage")
pytest.importorskip("matplotlib")

from fgbg_cuda.vae import CellsUnderDisc, DoubleELBO, DoubleELBOModule, NonFiniteLossError  # noqa: E402
from fgbg_cuda.vae.evaluation import figures  # noqa: E402
from fgbg_cuda.vae.models.double_elbo import pooled  # noqa: E402


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def x() -> torch.Tensor:
    return (torch.rand(6, 1, 60, 60) < torch.linspace(0.1, 0.9, 6)[:, None, None, None]).float()


def test_layers_have_the_sizes_of_the_thesis(x):
    model = DoubleELBO()
    sizes = []
    for layer in model.fg_encoder[:4]:
        x = layer(x)
        sizes.append(tuple(x.shape[1:]))
    assert sizes == [(16, 20, 20), (16, 20, 20), (16, 9, 9), (8, 8, 8)]  # mu and logvar
    assert model.bg_encoder[0].kernel_size == (30, 30)
    out = model(torch.rand(2, 1, 60, 60))
    assert [latent.z.shape for latent in (*out.z_fg, *out.z_bg)] == [(2, 4, 8, 8), (2, 1)]
    assert out.foreground.shape == (2, 1, 60, 60)
    assert out.background.shape == (2, 1, 2, 2)


def test_a_foreground_latent_sees_18_pixels_and_no_more(x):
    model = DoubleELBO()
    row, column = 3, 5
    window = slice(6 * row - 2, 6 * row + 16), slice(6 * column - 2, 6 * column + 16)
    inside = torch.zeros(60, 60, dtype=torch.bool)
    inside[window] = True
    before = model(x, sample=False).z_fg[0]
    for changed, same in ((~inside, True), (inside, False)):
        after = model(torch.where(changed, 1 - x, x), sample=False).z_fg[0]
        for a, b in ((before.mu, after.mu), (before.logvar, after.logvar)):
            assert torch.allclose(a[..., row, column], b[..., row, column], rtol=0, atol=1e-6) == same


def test_the_background_latent_sees_all_of_the_image(x):
    model = DoubleELBO()
    before = model(x, sample=False)
    for corner in (x[..., :30, :30], x[..., :30, 30:], x[..., 30:, :30], x[..., 30:, 30:]):
        corner.neg_().add_(1)
        assert not torch.equal(model(x, sample=False).z_bg[0].mu, before.z_bg[0].mu)
        corner.neg_().add_(1)


def test_a_part_of_a_batch_has_the_noise_it_has_in_the_whole(x):
    model = DoubleELBO()
    whole, part = model(x, seed=7), model(x[2:], seed=7, first=2)
    for a, b in zip((*whole.z_fg, *whole.z_bg), (*part.z_fg, *part.z_bg), strict=True):
        torch.testing.assert_close(a.z[2:], b.z)


def test_pooled_target_by_hand():
    x = torch.zeros(1, 1, 60, 60)
    x[..., :30, 30:] = 1  # one window full, one half full, two empty
    x[..., 30:45, :30] = 1
    expected = torch.sigmoid(torch.tensor([[[[-6.0, 6.0], [0.0, -6.0]]]]))
    torch.testing.assert_close(pooled(x), expected)


@pytest.mark.parametrize("inactive_weight", [1.0, 5.0])
def test_loss_against_torch_distributions(x, inactive_weight):
    module = DoubleELBOModule(lam=300.0, lam_weighs_kl=True, decay=0.02, inactive_weight=inactive_weight)
    out = module.model(x)

    def elbo(logits, target, latents):
        kl = sum(
            kl_divergence(Normal(q.mu, (q.logvar / 2).exp()), Normal(0, 1)).flatten(1).sum(1) for q in latents
        )
        # Soft targets: the expected log-probability, of 1 with the target's probability and else of 0.
        p = Bernoulli(logits=logits)
        one, zero = p.log_prob(torch.ones_like(target)), p.log_prob(torch.zeros_like(target))
        return (target * one + (1 - target) * zero).flatten(1).sum(1) - kl

    target = torch.sigmoid(12 * (x.unfold(2, 30, 30).unfold(3, 30, 30).sum((-1, -2)) / 900 - 0.5))
    nats = -(elbo(out.foreground, x, out.z_fg) + 300 * elbo(out.background, target, out.z_bg))
    weights = DoubleELBO.image_weights(x, inactive_weight)
    names = [n for n, _ in module.model.named_parameters() if "decoder" in n and n.endswith("weight")]
    assert len(names) == 3
    squares = sum(module.model.get_parameter(name).square().sum() for name in names)
    expected = (weights * nats).mean() + 0.02 * squares
    torch.testing.assert_close(module.objective(out, x, kl_weight=1.0)[0], expected)


def test_lambda_on_the_reconstruction_alone(x):
    whole, part = (DoubleELBOModule(lam=450.0, lam_weighs_kl=w) for w in (True, False))
    out = whole.model(x)
    part.load_state_dict(whole.state_dict())
    difference = whole.objective(out, x, 1.0)[0] - part.objective(out, x, 1.0)[0]
    # In float32, losses of this size differ by a few of their last digits.
    torch.testing.assert_close(difference, 449 * out.kl_bg.mean(), rtol=1e-3, atol=1e-2)


def test_dark_images_count_more(x):
    weights = DoubleELBO.image_weights(x, 3.0)  # x gets brighter from the first image to the last
    assert weights.mean().item() == pytest.approx(1)
    ratio = weights / weights[-1]
    assert ratio[0].item() == pytest.approx(3)
    assert set(ratio.round().tolist()) == {1.0, 3.0}
    assert torch.equal(DoubleELBO.image_weights(x, 1.0), torch.ones(6))


@pytest.mark.parametrize("sees", [True, False])
def test_interaction_into_the_background(x, sees):
    """The foreground's latents reach the background's decoder, or do not; the reverse they always do."""
    model = DoubleELBO(background_sees_foreground=sees)
    out = model(x, sample=False)
    z_fg, z_bg = out.z_fg[0].z, out.z_bg[0].z
    gradient = torch.autograd.grad(out.background.sum(), z_fg, retain_graph=True, allow_unused=True)[0]
    assert (gradient is not None and gradient.abs().sum() > 0) == sees
    assert torch.autograd.grad(out.foreground.sum(), z_bg)[0].abs().sum() > 0


def test_more_latents(x):
    out = DoubleELBO(fg_latents=12, bg_latents=3)(x)
    assert out.z_fg[0].z.shape == (6, 12, 8, 8)
    assert out.z_bg[0].z.shape == (6, 3)


def test_background_picture_undoes_the_pooling(x):
    model = DoubleELBO()
    found = model.separate(x)
    logits = model(x, sample=False).background
    assert logits.abs().max() < 6  # else a mean of pixels, which lies in [0, 1], cannot give it
    # In float64: a float32 mean of 900 numbers alone may be off by more than the tolerance.
    again = torch.sigmoid(12 * (F.avg_pool2d(found.background.double(), 30) - 0.5))
    torch.testing.assert_close(again.float(), torch.sigmoid(logits).detach())
    assert found.foreground.shape == found.mask.shape == x.shape


@pytest.mark.parametrize("bg_latents", [1, 3])
def test_the_foreground_picture_is_that_of_z1_without_the_background(x, bg_latents):
    model = DoubleELBO(bg_latents=bg_latents).eval()
    with torch.no_grad():
        model.interaction.weight[:, -bg_latents:] *= 30  # an untrained z2 hardly shows
        model.recent_z_bg[:, -1] *= 3
    out, found = model(x, sample=False), model.separate(x)
    z_fg, z_bg = out.z_fg[0].mu, out.z_bg[0].mu
    torch.testing.assert_close(found.composite, model.decode(z_fg, z_bg))
    nothing = model.inactive_background(z_fg)
    reach = torch.ones(bg_latents)
    reach[-1] = 3
    # The 5 % quantile of 1000 evenly spaced quantiles of N(0, 1), which lie 0.01 apart there: interpolated.
    end = -Normal(0, 1).icdf(torch.tensor((0.05 * 999 + 0.5) / 1000))
    torch.testing.assert_close(nothing.abs(), end * reach.expand_as(nothing), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.foreground, model.decode(z_fg, nothing))
    for latent in range(bg_latents):  # each at its darker end
        end = torch.zeros_like(nothing)
        end[:, latent] = nothing[:, latent]
        dark, bright = (model.decode(z_fg, z).flatten(1).mean(1) for z in (end, -end))
        assert (dark <= bright).all()


def test_where_z2_ends_is_learned_from_the_images_seen_in_training(x):
    model = DoubleELBO(bg_latents=2)
    before = model.recent_z_bg.clone()
    model.eval()(x)
    assert torch.equal(model.recent_z_bg, before)
    model.train()
    for _ in range(200):
        out = model(x)
    assert torch.equal(model.recent_z_bg[-len(x) :], out.z_bg[0].mu)
    assert model.recent_z_bg.shape == before.shape
    ends = torch.quantile(out.z_bg[0].mu, torch.tensor([0.0, 1.0]), dim=0)  # of six images, the outer ones
    for z in model.eval().inactive_background(out.z_fg[0].mu):
        assert ((z - ends).abs().amin(0) < 1e-6).all()


def test_every_latent_is_a_row_of_the_exploration_plot(x, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "montage", lambda cells, *headings: drawn.append((cells, *headings)))
    figures.traversal_figure(DoubleELBO(), x[:1])
    ((cells, _, rows),) = drawn
    assert sorted(row.split("\n")[0] for row in rows) == ["z0[0]", "z0[1]", "z0[2]", "z0[3]", "z1[0]"]
    assert all(picture.shape == (1, 60, 60) for row in cells for picture in row)


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"x has shape \[2, 1, 64, 64\], expected \[B, 1, 60, 60\]"):
        DoubleELBO()(torch.zeros(2, 1, 64, 64))


def quiet_trainer(**options) -> L.Trainer:
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return L.Trainer(accelerator="cpu", **dict.fromkeys(quiet, False), **options)


def test_training_lowers_the_loss_and_the_checkpoint_says_the_same(tmp_path):
    L.seed_everything(0)
    data = CellsUnderDisc("X50", train=200, val=20, test=20, batch_size=20)
    module = DoubleELBOModule(lr=3e-3)
    losses = []

    class Record(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            losses.append(outputs["loss"].item())

    trainer = quiet_trainer(max_epochs=2, callbacks=[Record()])
    trainer.fit(module, datamodule=data)
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    loaded = DoubleELBOModule.load_from_checkpoint(tmp_path / "some.ckpt", weights_only=True)
    image = data.splits["test"].image
    module.eval()
    loaded.eval()
    assert all(torch.equal(a, b) for a, b in zip(module.separate(image), loaded.separate(image), strict=True))


@pytest.mark.parametrize(("steps", "expected"), [(0, [1] * 6), (4, [0.01, 0.2575, 0.505, 0.7525, 1, 1])])
def test_the_rate_of_the_first_steps_rises(steps, expected):
    rates = []

    class Record(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer = quiet_trainer(max_steps=6, callbacks=[Record()])
    data = CellsUnderDisc("X50", train=120, val=20, test=20, batch_size=20)
    trainer.fit(DoubleELBOModule(lr=2e-3, lr_warmup=steps), datamodule=data)
    assert rates == pytest.approx([2e-3 * part for part in expected])
    with pytest.raises(ValueError, match="lr_warmup is -1, expected a whole number"):
        DoubleELBOModule(lr_warmup=-1)


def test_a_loss_that_is_not_finite_names_its_term(x):
    module = DoubleELBOModule()
    trainer = quiet_trainer(max_steps=2)
    with torch.no_grad():
        module.model.bg_decoder[0].bias.fill_(float("nan"))
    loader = torch.utils.data.DataLoader(x, batch_size=3)  # bare tensors, without any truth
    with pytest.raises(NonFiniteLossError, match="at step 0, batch 0 of epoch 0: the background has NaN"):
        trainer.fit(module, loader)
