"""The layered VAE: data, metrics, training, checkpoint, demo."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch

L = pytest.importorskip("lightning")
pytest.importorskip("skimage")
pytest.importorskip("mlxtend")
pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")

from fgbg_cuda.vae import (  # noqa: E402
    DigitsOnTexture,
    LayeredVAE,
    LayeredVAEModule,
    Networks,
    ObjectNetworks,
)
from fgbg_cuda.vae.commands import demo  # noqa: E402
from fgbg_cuda.vae.data import digits as vae_data  # noqa: E402
from fgbg_cuda.vae.evaluation.figures import COLUMNS, save_separation  # noqa: E402
from fgbg_cuda.vae.evaluation.metrics import (  # noqa: E402
    background_mse,
    foreground_mse,
    mask_dice,
    mask_iou,
    threshold_scores,
)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def small_data() -> DigitsOnTexture:
    return DigitsOnTexture(size=32, train=64, val=8, test=8, batch_size=16)


def trainer(tmp_path, **options) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


# ---- data ----


def test_same_seed_same_images():
    def make(seed):
        return vae_data.make_split("val", 6, background="grass", size=64, seed=seed)

    first, again, other = make(3), make(3), make(4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.image, other.image)


@pytest.mark.parametrize("background", vae_data.BACKGROUNDS)
@pytest.mark.parametrize("size", sorted(vae_data.DIGIT_SIDE))
def test_images_are_what_the_truth_says(background, size):
    batch = vae_data.make_split("test", 20, background=background, size=size, seed=0)
    assert batch.image.shape == (20, 1, size, size)
    assert batch.image.min() >= 0
    assert batch.image.max() <= 1
    clean = batch.alpha * batch.tone + (1 - batch.alpha) * batch.background
    residual = batch.image - clean
    assert residual.abs().max() < 6 * vae_data.SENSOR_NOISE
    assert residual.std().item() == pytest.approx(vae_data.SENSOR_NOISE, rel=0.05)
    area = (batch.alpha > 0.5).float().mean((1, 2, 3))
    assert (area > 0.005).all()
    assert (area < 0.35).all()


def test_splits_share_no_digit_and_no_texture():
    for table, total in ((vae_data.DIGIT_RANGES, 5000), (vae_data.STRIPS, 512)):
        owned = [i for split in vae_data.SPLITS for i in range(*table[split])]
        assert sorted(owned) == list(range(total))
    digits = vae_data.load_digits(seed=0)
    train, test = (digits[slice(*vae_data.DIGIT_RANGES[s])].flatten(1) for s in ("train", "test"))
    assert torch.cdist(test, train).min() > 0  # no two of the 5000 digits are the same picture

    texture = torch.from_numpy(vae_data.load_texture("brick"))
    batch = vae_data.make_split("test", 3, background="brick", size=32, seed=0)
    own = texture[:, slice(*vae_data.STRIPS["test"])].unfold(0, 32, 1).unfold(1, 32, 1)
    for crop in batch.background[:, 0]:
        assert (own == crop).flatten(2).all(-1).any()


def test_training_order_repeats_and_covers(small_data):
    small_data.setup()
    twin = DigitsOnTexture(size=32, train=64, val=8, test=8, batch_size=16)
    twin.setup()
    first, again = (torch.cat([b.image for b in d.train_dataloader()]) for d in (small_data, twin))
    assert torch.equal(first, again)
    assert len(first) == 64
    assert not torch.equal(first, small_data.splits["train"].image)  # shuffled


def test_bad_data_arguments_say_what_is_allowed():
    with pytest.raises(ValueError, match="grass, brick, gravel"):
        vae_data.load_texture("sand")
    with pytest.raises(ValueError, match=r"size: got 48, takes one of \[32, 64\]"):
        vae_data.make_split("val", 1, background="grass", size=48, seed=0)


# ---- metrics ----


def test_overlap_by_hand():
    mask = torch.tensor([[0.9, 0.6, 0.4, 0.0], [1, 1, 1, 1], [0, 0, 0, 0]])
    truth = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    # pixels in both / in either: 1/3, 1/4, and two empty masks, which agree
    torch.testing.assert_close(mask_iou(mask, truth), torch.tensor([1 / 3, 1 / 4, 1.0]))
    torch.testing.assert_close(mask_dice(mask, truth), torch.tensor([1 / 2, 2 / 5, 1.0]))


def test_squared_errors_by_hand():
    predicted = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    mask = torch.tensor([[[[True, False], [False, True]]]])
    tone = torch.full((1, 1, 1, 1), 2.0)
    # (1-2)^2 and (4-2)^2 inside the mask; 1, 0, 1, 4 everywhere
    torch.testing.assert_close(foreground_mse(predicted, tone, mask), torch.tensor([2.5]))
    torch.testing.assert_close(background_mse(predicted, tone), torch.tensor([1.5]))
    empty = torch.zeros_like(mask)
    torch.testing.assert_close(foreground_mse(predicted, tone, empty), torch.tensor([0.0]))


def test_thresholds_by_hand():
    truth = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    truth[:, :, :2, :2] = True
    image = torch.full((2, 1, 4, 4), 0.5)
    image[0][truth[0]] = 0.8  # a bright object, then a dark one: no polarity serves both
    image[1][truth[1]] = 0.2
    scores = threshold_scores(image, truth)
    assert scores["oracle_per_image"] == pytest.approx(1.0)
    # "brighter than 0.6" finds the first object and nothing in the second image
    assert scores["oracle_global"] == pytest.approx(0.5)
    assert scores["otsu"] == pytest.approx(0.5)


# ---- model and training ----


def test_output_shapes_and_ranges():
    model = LayeredVAE(shape=(3, 32, 48), networks=ObjectNetworks(width=8))
    x = torch.rand(2, 3, 32, 48)
    out = model(x)
    assert out.foreground.shape == out.background.shape == x.shape
    assert out.mask_logits.shape == (2, 1, 32, 48)
    assert out.kl_fg.shape == out.kl_bg.shape == model.reconstruction(out, x).shape == (2,)
    assert (out.kl_fg > 0).all()
    assert (out.kl_bg > 0).all()
    found = model.separate(x)
    assert found.mask.shape == (2, 1, 32, 48)
    assert found.mask.min() >= 0
    assert found.mask.max() <= 1
    assert not found.composite.requires_grad


def test_parts_of_a_batch_get_the_noise_of_the_whole():
    model = LayeredVAE(networks=ObjectNetworks(width=8))
    x = torch.rand(6, 1, 32, 32)
    whole = model(x, seed=5)
    parts = [model(x[:2], seed=5), model(x[2:], seed=5, first=2)]
    for name in ("foreground", "background", "mask_logits", "kl_fg", "kl_bg"):
        ours = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(ours, getattr(whole, name), msg=lambda m, n=name: f"{n}: {m}")
    shifted = model(x[2:], seed=5)  # without the place, another noise
    assert not torch.allclose(shifted.foreground, whole.foreground[2:])


def test_backgrounds_as_coarse_as_told():
    x = torch.rand(2, 1, 64, 96)
    for cell in (8, 16, 32):
        model = LayeredVAE(networks=ObjectNetworks(width=8, bg_cell=cell))
        mu, _ = model.bg_encoder(x)
        assert mu.shape == (2, 2, 64 // cell, 96 // cell)
        assert model.bg_decoder(mu).shape == x.shape
    with pytest.raises(ValueError, match="x is 64 x 72, expected multiples of 32"):
        model.bg_encoder(x[..., :72])
    with pytest.raises(ValueError, match="bg_cell is 12, expected 8, 16 or 32"):
        ObjectNetworks(bg_cell=12)


@pytest.mark.parametrize("size", [(60, 60), (33, 47), (5, 3)])
def test_sizes_that_the_networks_do_not_take_are_padded(size):
    """Each layer is that of the padded image, cut; an image that fits is left alone."""
    model = LayeredVAE(networks=ObjectNetworks(width=8))
    x = torch.rand(2, 1, *size)
    whole = torch.nn.functional.pad(x, (0, -size[1] % 8, 0, -size[0] % 8), mode="replicate")
    out, padded = model(x, seed=3), model(whole, seed=3)
    for layer, of_whole in zip(out[:3], padded[:3], strict=True):
        assert layer.shape == x.shape
        assert torch.equal(layer, of_whole[..., : size[0], : size[1]])
    assert torch.equal(out.kl_fg, padded.kl_fg)
    assert model.reconstruction(out, x).isfinite().all()
    assert model.separate(x).mask.shape == x.shape


def test_mask_is_the_gradient_of_the_likelihood():
    """d log p(x | z) / d logit = posterior - prior: the mask is the posterior of the model."""
    model = LayeredVAE(networks=ObjectNetworks(width=8)).double()
    x = torch.rand(2, 1, 32, 32, dtype=torch.float64)
    out = model(x, sample=False)
    logits = out.mask_logits.detach().requires_grad_()
    nats = model.reconstruction(out._replace(mask_logits=logits), x).sum()
    (gradient,) = torch.autograd.grad(nats, logits)
    torch.testing.assert_close(model.separate(x).mask, torch.sigmoid(logits) - gradient)


def test_networks_can_be_replaced():
    class Encoder(torch.nn.Module):
        def forward(self, x):
            mean = x.flatten(1)[:, :4]
            return ((mean, torch.zeros_like(mean)),)  # one Gaussian instead of three

    class Decoder(torch.nn.Module):
        def forward(self, z):
            logits = z.mean(1).view(-1, 1, 1, 1).expand(-1, -1, 32, 32)
            return torch.sigmoid(logits), logits

    class Mine(Networks):
        size_multiple = 8

        def build(self, shape, likelihood):
            return Encoder(), Decoder(), *ObjectNetworks().build(shape, likelihood)[2:]

    model = LayeredVAE(networks=Mine())
    assert model.separate(torch.rand(2, 1, 32, 32)).mask.shape == (2, 1, 32, 32)


def test_what_the_networks_make_is_channels_last():
    """As it is faster; the images themselves may come in any layout."""
    module = LayeredVAEModule(shape=(3, 32, 32), networks=ObjectNetworks(width=8))
    out = module.model(torch.rand(2, 3, 32, 32))
    assert out.background.is_contiguous(memory_format=torch.channels_last)
    assert not out.background.is_contiguous()


def test_training_lowers_the_loss_and_ends_on_the_plain_elbo(tmp_path, small_data):
    L.seed_everything(0)
    module = LayeredVAEModule(networks=ObjectNetworks(width=8))
    losses = []

    class Record(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            losses.append(outputs["loss"].item())

    fit = trainer(tmp_path, max_epochs=8, callbacks=[Record()])
    fit.fit(module, datamodule=small_data)
    assert sum(losses[-4:]) < sum(losses[:4])
    assert module.model.fg_scale.item() == pytest.approx(module.model.target_fg_scale)
    scores = fit.test(module, datamodule=small_data, verbose=False)[0]
    assert set(scores) == {f"test/{name}" for name in ("elbo", "mask", "iou", "dice", "fg_mse", "bg_mse")}


@dataclass(frozen=True)
class Narrow(Networks):
    """Networks of one's own."""

    width: int = 12
    size_multiple = 8

    def build(self, shape, likelihood):
        return ObjectNetworks(width=self.width).build(shape, likelihood)


@pytest.mark.parametrize("networks", [ObjectNetworks(width=8, fg_latents=4), Narrow(4)])
def test_checkpoint_gives_identical_outputs(networks, tmp_path, small_data):
    module = LayeredVAEModule(networks=networks)
    fit = trainer(tmp_path, max_steps=3)
    fit.fit(module, datamodule=small_data)
    path = tmp_path / "some.ckpt"
    fit.save_checkpoint(path)
    torch.load(path, weights_only=True)  # nothing but tensors and plain values inside
    loaded = LayeredVAEModule.load_from_checkpoint(path, weights_only=True)
    assert {name: loaded.hparams[name] for name in module.hparams} == dict(module.hparams)
    assert loaded.model.networks == networks
    image = small_data.splits["test"].image
    before, after = module.eval().model.separate(image), loaded.eval().model.separate(image)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# ---- figure and demo ----


def test_figure_has_a_column_for_each_part(tmp_path):
    from matplotlib.image import imread

    image = torch.rand(2, 1, 32, 32)
    found = LayeredVAE(networks=ObjectNetworks(width=8)).separate(image)
    save_separation(tmp_path / "picture.png", image, found, image > 0.5)
    height, width = imread(tmp_path / "picture.png").shape[:2]
    assert width > height > 100
    assert len(COLUMNS) == 6


def test_demo_writes_its_files(tmp_path):
    out = tmp_path / "demo"
    config = demo.DemoConfig(size=32, out=str(out), epochs=1, train=64, val=8, test=8, rows=2, width=8)
    result = demo.run(config)
    assert json.loads((out / "metrics.json").read_text()) == result
    assert set(result["test"]) == {"elbo", "mask", "iou", "dice", "fg_mse", "bg_mse"}
    assert set(result["threshold_iou"]) == {"otsu", "oracle_global", "oracle_per_image"}
    assert result["steps"] == result["steps_planned"] == 1
    assert (out / "separation.png").read_bytes().startswith(b"\x89PNG")
    assert list((out / "tensorboard").rglob("events.out.tfevents.*"))
    LayeredVAEModule.load_from_checkpoint(out / "layered_vae.ckpt", weights_only=True)
    assert "mask IoU" in demo.table(result)
    assert "time limit" not in demo.table(result)
    assert "time limit" in demo.table({**result, "steps": 0})
