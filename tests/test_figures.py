"""The pictures: what they show, for any number and shape of images, and that drawing changes nothing."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

L = pytest.importorskip("lightning")
pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")

from lightning.pytorch.loggers import TensorBoardLogger  # noqa: E402
from matplotlib.image import imread  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

from fgbg_cuda.vae import LayeredVAE, LayeredVAEModule, ObjectNetworks, Separation  # noqa: E402
from fgbg_cuda.vae.evaluation.figures import (  # noqa: E402
    curves_figure,
    overlay_figure,
    separation_figure,
    traversal_figure,
)
from fgbg_cuda.vae.models.layered import Latent, LayeredOutput  # noqa: E402
from fgbg_cuda.vae.training.pictures import Pictures  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.* is deprecated", "ignore:.*does not have many workers"
)


def rendered(figure) -> np.ndarray:
    file = io.BytesIO()
    figure.savefig(file, dpi=120)
    file.seek(0)
    return imread(file)[..., :3]


def separation(x: torch.Tensor) -> Separation:
    return Separation(x, 1 - x, (x[:, :1] > 0.5).float(), x)


@pytest.mark.parametrize("shape", [(1, 1, 16, 16), (3, 3, 16, 40), (9, 1, 40, 16)])
@pytest.mark.parametrize("known", [True, False])
def test_every_shape_is_drawn(shape, known):
    x = torch.rand(shape)
    found = separation(x)
    truth = found.mask if known else None
    assert rendered(separation_figure(x, found, truth)).std() > 0
    assert rendered(overlay_figure(x, found.mask, truth)).std() > 0


def test_the_columns_are_the_layers():
    """Each layer is painted in a gray of its own, and found where its column is."""
    full = torch.ones(2, 1, 32, 32)
    figure = separation_figure(0.1 * full, Separation(0.2 * full, 0.3 * full, full, 0.5 * full), 0.6 * full)
    table = figure.axes[0].images[0].get_array()
    assert np.asarray(table)[16, 16::34, 0] == pytest.approx([0.1, 0.2, 0.3, 1.0, 0.5, 0.6])
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == ["input", "foreground", "background", "mask", "composite", "truth"]


def test_outlines_are_red_and_the_truth_green():
    x = torch.zeros(1, 1, 32, 32)
    mask = torch.zeros_like(x)
    mask[..., 8:24, 8:24] = 1
    picture = rendered(overlay_figure(x, mask))
    assert ((picture[..., 0] > 0.9) & (picture[..., 1] < 0.1)).any()
    assert not ((picture[..., 1] > 0.9) & (picture[..., 0] < 0.1)).any()
    picture = rendered(overlay_figure(x, torch.zeros_like(x), mask))  # an empty mask has no outline
    assert ((picture[..., 1] > 0.9) & (picture[..., 0] < 0.1)).any()
    assert not ((picture[..., 0] > 0.9) & (picture[..., 1] < 0.1)).any()


class Toy:
    """Two latents that shift the gray level, of which the second is sure, and one that does nothing."""

    def __call__(self, x, sample):
        mu, unused = torch.tensor([[0.1, 0.5]]), torch.zeros(1, 1, 4, 4)
        z_fg, z_bg = Latent(mu, mu, torch.tensor([[0.0, -4.0]])), Latent(unused, unused, unused)
        return LayeredOutput(*5 * (None,), (z_fg,), (z_bg,))

    def decode(self, z, unused):
        return (0.5 + z @ torch.tensor([[0.1], [0.05]])).view(1, 1, 1, 1).expand(1, 1, 8, 8)


def test_a_traversal_varies_one_latent_at_a_time():
    figure = traversal_figure(Toy(), torch.rand(1, 1, 8, 8), values=(-2, 0, 2))
    table = figure.axes[0].images[0].get_array()[4::10, 4::10, 0]
    # Sorted by KL: the sure one, the other at its mean of 0.1; the other, with this one at 0.5; the last.
    np.testing.assert_allclose(
        table,
        [
            [0.5 + 0.01 + 0.05 * v for v in (-2, 0, 2)],
            [0.5 + 0.025 + 0.1 * v for v in (-2, 0, 2)],
            [0.535] * 3,
        ],
        rtol=1e-6,
    )
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert [label.split("\n")[0] for label in labels] == ["z0[1]", "z0[0]", "z1[0]"]
    assert labels[2].endswith("0.0 nats")


def test_a_traversal_through_the_means_is_the_reconstruction():
    model = LayeredVAE(networks=ObjectNetworks(width=8))
    x = torch.rand(1, 1, 32, 32)
    out = model(x, sample=False)
    means = [latent.mu for latent in (*out.z_fg, *out.z_bg)]
    group, channel = 1, 0  # of the tone
    value = means[group][0, channel].item()
    figure = traversal_figure(model, x, values=(value,), rows=100)
    names = [label.get_text().split("\n")[0] for label in figure.axes[0].get_yticklabels()]
    row = names.index(f"z{group}[{channel}]")
    table = figure.axes[0].images[0].get_array()[34 * row : 34 * row + 32, :, 0]
    expected = model.decode(*means)[0, 0]
    np.testing.assert_allclose(table, expected.detach().numpy(), rtol=1e-5)


def fit(folder, *callbacks, logger) -> list[torch.Tensor]:
    L.seed_everything(0)
    module = LayeredVAEModule(networks=ObjectNetworks(width=8))
    loader = torch.utils.data.DataLoader(torch.rand(16, 1, 32, 32, generator=torch.Generator()), batch_size=8)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=3, logger=logger, log_every_n_steps=1, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module, loader, loader)
    return [*module.state_dict().values(), torch.get_rng_state()]


def test_drawing_does_not_change_the_training(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    drawn = fit(tmp_path, Pictures(tmp_path / "pictures", every_n_epochs=2), logger=logger)
    plain = fit(tmp_path, logger=False)
    assert all(torch.equal(a, b) for a, b in zip(drawn, plain, strict=True))

    names = ("separation", "overlay", "traversal", "curves")
    assert all(imread(tmp_path / "pictures" / f"{name}.png").std() > 0 for name in names)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    assert sorted(events.Tags()["images"]) == ["overlay", "separation", "traversal"]
    assert len(events.Images("overlay")) == 2  # after the second epoch and the third, the last

    figure = curves_figure(tmp_path)
    curves = {ax.get_title(): ax.lines for ax in figure.axes if ax.lines}
    assert len(curves["elbo"][0].get_xdata()) == 3
    assert len(curves["loss"][0].get_xdata()) == 6


def test_nothing_logged_is_no_curve(tmp_path):
    assert curves_figure(tmp_path) is None
