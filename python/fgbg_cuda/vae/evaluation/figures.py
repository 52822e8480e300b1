"""The pictures: layers found, masks over images, what each latent does, and how training went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

import fgbg_cuda

from ..models.layered import Separation

COLUMNS = ("input", "foreground", "background", "mask", "composite", "truth")
SCORES = (
    ("f1_open", "cell F1 in the open"),
    ("f1_covered", "cell F1 under a disc"),
    ("leakage", "leakage: R² of discs from z_fg"),
)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no display needed, and pyplot's global state left alone
    return figure


def _picture(image: Tensor) -> np.ndarray:
    """An image [C, H, W] in [0, 1] as RGB [H, W, 3]."""
    return image.detach().cpu().float().expand(3, -1, -1).permute(1, 2, 0).clamp(0, 1).numpy()


def montage(cells: list[list[Tensor]], columns: Sequence[str], rows: Sequence[str] = ()) -> Figure:
    """A table of images of one size, with its headings; drawn as one, as many axes take their time."""
    gap = 2
    height, width = cells[0][0].shape[-2:]
    step = np.array([height + gap, width + gap])
    table = np.ones((*(step * (len(cells), len(columns)) - gap), 3))
    for i, j in np.ndindex(len(cells), len(columns)):
        top, left = step * (i, j)
        table[top : top + height, left : left + width] = _picture(cells[i][j])
    side = 1.3  # inches
    figure = _figure(side * len(columns) + 0.8 * bool(rows), side * len(cells) * height / width + 0.3)
    axes = figure.subplots()
    axes.imshow(table, interpolation="nearest")
    axes.set_xticks(np.arange(len(columns)) * step[1] + width / 2, columns, fontsize=9)
    axes.set_yticks(np.arange(len(rows)) * step[0] + height / 2, rows, fontsize=7)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def separation_figure(image: Tensor, found: Separation, truth: Tensor | None = None) -> Figure:
    """One row per image [B, C, H, W] (C 1 or 3): input, the layers found, and the true mask if known."""
    columns = [image, found.foreground, found.background, found.mask, found.composite]
    if truth is not None:
        columns.append(truth.float())
    return montage([list(row) for row in zip(*columns, strict=True)], COLUMNS[: len(columns)])


def save_separation(path: str | Path, image: Tensor, found: Separation, truth: Tensor | None = None) -> None:
    """Writes a :func:`separation_figure`."""
    separation_figure(image, found, truth).savefig(path, dpi=120)


def save_film(path: str | Path, layers: Sequence[np.ndarray], seconds: float = 0.1) -> None:
    """Writes an animated GIF of ``layers``, each [T, H, W] or [T, H, W, C] in 8 bits, side by side."""
    import PIL.Image

    films = [np.broadcast_to(x if x.ndim == 4 else x[..., None], (*x.shape[:3], 3)) for x in layers]
    gap = np.full((*films[0].shape[:2], 2, 3), 255, np.uint8)
    table = np.concatenate([part for film in films for part in (film, gap)][:-1], axis=2)
    frames = [PIL.Image.fromarray(frame).quantize(64, dither=PIL.Image.Dither.NONE) for frame in table]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(1000 * seconds), loop=0)


def overlay_figure(image: Tensor, mask: Tensor, truth: Tensor | None = None, columns: int = 4) -> Figure:
    """The outline of each mask [B, 1, H, W], cut at 0.5, in red over its image; the truth's in green."""
    columns = min(columns, len(image))
    rows = -(-len(image) // columns)
    figure = _figure(2 * columns, 2 * rows * image.shape[-2] / image.shape[-1])
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for i, ax in enumerate(axes.flat[: len(image)]):
        ax.imshow(_picture(image[i]), interpolation="nearest")
        for outline, colour in ((truth, "lime"), (mask, "red")):
            if outline is not None:
                inside = np.pad(outline[i, 0].detach().cpu().numpy() > 0.5, 1)  # closed at the border
                if inside.any():
                    y, x = (np.arange(side) - 1 for side in inside.shape)
                    ax.contour(x, y, inside, [0.5], colors=colour, linewidths=0.8)
    return figure


@torch.no_grad()
def traversal_figure(
    model: Any, image: Tensor, values: Sequence[float] = (-3, -2, -1, 0, 1, 2, 3), rows: int = 10
) -> Figure:
    """What each latent does: the composite with one latent at each of ``values``, the others at their means.

    The thesis's exploration plot. The prior of a latent being N(0, 1), -3 to 3 is all that it has to say. A
    latent that is a map, [channels, h, w], is set as a whole, a row for each channel. The rows are those with
    the largest KL for this image: a latent whose KL is 0 is not in use.

    Args:
        model: with ``forward`` and ``decode`` as those of :class:`LayeredVAE`.
        image: [1, C, H, W].
    """
    out = model(image, sample=False)
    latents = (*out.z_fg, *out.z_bg)
    nats = {}  # of each channel
    for group, (_, mu, logvar) in enumerate(latents):
        kl = fgbg_cuda.gaussian_kl(mu, logvar, reduction="none")[0]
        for channel, value in enumerate(kl.reshape(len(kl), -1).sum(1).tolist()):
            nats[group, channel] = value
    chosen = sorted(nats, key=nats.get, reverse=True)[:rows]
    means = [latent.mu for latent in latents]

    def with_latent(group: int, channel: int, value: float) -> Tensor:
        z = [*means]
        z[group] = means[group].clone()
        z[group][:, channel] = value
        return model.decode(*z)[0]

    return montage(
        [[with_latent(*latent, value) for value in values] for latent in chosen],
        [f"{value:g}" for value in values],
        [f"z{group}[{channel}]\n{nats[group, channel]:.1f} nats" for group, channel in chosen],
    )


def read_curves(log_dir: str | Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) pairs of every scalar in a TensorBoard folder, with all parts of an interrupted run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(log_dir), size_guidance={"scalars": 0})  # 0: all of them
    events.Reload()
    # TensorBoard takes the parts in the order of their names, which hold the second and then the text of a
    # number: parts of the same second may come in any order.
    return {
        tag: [(e.step, e.value) for e in sorted(events.Scalars(tag), key=lambda e: (e.step, e.wall_time))]
        for tag in sorted(events.Tags()["scalars"])
        if "/" in tag
    }


def curves_figure(log_dir: str | Path) -> Figure | None:
    """Every score and loss against the training step, from the TensorBoard files in ``log_dir``.

    None if nothing has been logged yet.
    """
    curves = read_curves(log_dir)
    names = sorted({tag.split("/", 1)[1] for tag in curves})
    if not names:
        return None
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = _figure(2.4 * columns, 2.4 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat[len(names) :]:
        ax.set_axis_off()
    for ax, name in zip(axes.flat, names, strict=False):
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("step", fontsize=7)
        ax.tick_params(labelsize=7)
        for tag in (tag for tag in curves if tag.endswith("/" + name)):
            marker = "." if len(curves[tag]) < 20 else None  # a single value is no line
            ax.plot(*zip(*curves[tag], strict=True), marker=marker, label=tag.split("/")[0])
        ax.legend(fontsize=7)
    return figure


def save_scores(path: str | Path, results: list[dict[str, Any]]) -> None:
    """One panel for each score, one group for each set, one colour for each model, one dot for each run."""
    models = list(dict.fromkeys(r["model"] for r in results))
    sets = list(dict.fromkeys(r["set"] for r in results))
    figure = _figure(4 * len(SCORES), 3.2)
    axes = figure.subplots(1, len(SCORES), squeeze=False)[0]
    for ax, (key, title) in zip(axes, SCORES, strict=True):
        for i, model in enumerate(models):
            runs = [r for r in results if r["model"] == model and key in r]
            x = [sets.index(r["set"]) + 0.15 * (i - (len(models) - 1) / 2) for r in runs]
            ax.plot(x, [r[key] for r in runs], "o", ms=5, alpha=0.7, color=f"C{i}", label=model)
        ax.set_title(title, fontsize=10)
        ax.set_xticks(range(len(sets)), sets)
        ax.set_ylim(-0.1, 1.05)
        ax.grid(axis="y", alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
