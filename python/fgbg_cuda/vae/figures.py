"""The pictures: layers found, masks over images, what each latent does, and how training went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

import fgbg_cuda

from .models import Separation

COLUMNS = ("input", "foreground", "background", "mask", "composite", "truth")


def _grid(rows: int, columns: int, size: float = 1.3) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(size * columns, size * rows + 0.3), layout="constrained")
    FigureCanvasAgg(figure)  # no display needed, and pyplot's global state left alone
    return figure, figure.subplots(rows, columns, squeeze=False)


def _show(axes: Axes, image: Tensor) -> None:
    """An image [C, H, W] in [0, 1]."""
    picture = image.detach().cpu().float().permute(1, 2, 0).clamp(0, 1).numpy()
    axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()


def separation_figure(image: Tensor, found: Separation, truth: Tensor | None = None) -> Figure:
    """One row per image [B, C, H, W] (C 1 or 3): input, the layers found, and the true mask if known.

    The foreground is shown through its mask, on black.
    """
    columns = [image, found.foreground * found.mask, found.background, found.mask, found.composite]
    if truth is not None:
        columns.append(truth.float())
    figure, axes = _grid(len(image), len(columns))
    for j, (title, column) in enumerate(zip(COLUMNS, columns, strict=False)):
        axes[0, j].set_title(title, fontsize=9)
        for i in range(len(image)):
            _show(axes[i, j], column[i])
    return figure


def save_separation(path: str | Path, image: Tensor, found: Separation, truth: Tensor | None = None) -> None:
    """Writes a :func:`separation_figure`."""
    separation_figure(image, found, truth).savefig(path, dpi=120)


def overlay_figure(image: Tensor, mask: Tensor, truth: Tensor | None = None, columns: int = 4) -> Figure:
    """The outline of each mask [B, 1, H, W], cut at 0.5, in red over its image; the truth's in green."""
    rows = -(-len(image) // columns)
    figure, axes = _grid(rows, min(columns, len(image)), size=2.0)
    for ax in axes.flat:
        ax.set_axis_off()
    for i, ax in enumerate(axes.flat[: len(image)]):
        _show(ax, image[i])
        for outline, colour in ((truth, "lime"), (mask, "red")):
            if outline is not None:
                inside = np.pad(outline[i, 0].detach().cpu().numpy() > 0.5, 1)  # closed at the border
                if inside.any():
                    at = np.arange(-1, max(inside.shape) - 1)
                    ax.contour(
                        at[: inside.shape[1]],
                        at[: inside.shape[0]],
                        inside,
                        [0.5],
                        colors=colour,
                        linewidths=0.8,
                    )
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
        model: with ``encode(x)``, the (mu, logvar) of each group of latents, and ``decode(*z)``.
        image: [1, C, H, W].
    """
    posteriors = model.encode(image)
    nats = {}  # of each channel
    for group, (mu, logvar) in enumerate(posteriors):
        kl = fgbg_cuda.gaussian_kl(mu, logvar, reduction="none")[0]
        for channel, value in enumerate(kl.reshape(len(kl), -1).sum(1).tolist()):
            nats[group, channel] = value
    chosen = sorted(nats, key=nats.get, reverse=True)[:rows]
    figure, axes = _grid(len(chosen), len(values))
    for i, (group, channel) in enumerate(chosen):
        for j, value in enumerate(values):
            z = [mu.clone() for mu, _ in posteriors]
            z[group][:, channel] = value
            _show(axes[i, j], model.decode(*z).composite[0])
            if i == 0:
                axes[i, j].set_title(f"{value:g}", fontsize=9)
        axes[i, 0].text(
            0,
            1,
            f"z{group}[{channel}] {nats[group, channel]:.1f} nats",
            fontsize=6,
            color="red",
            transform=axes[i, 0].transAxes,
            verticalalignment="top",
        )
    return figure


def curves_figure(log_dir: str | Path) -> Figure | None:
    """Every score and loss against the training step, from the TensorBoard files in ``log_dir``.

    None if nothing has been logged yet.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(log_dir), size_guidance={"scalars": 0})  # 0: all of them
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if "/" in tag]
    names = sorted({tag.split("/", 1)[1] for tag in tags})
    if not names:
        return None
    columns = min(4, len(names))
    figure, axes = _grid(-(-len(names) // columns), columns, size=2.4)
    for ax in axes.flat[len(names) :]:
        ax.set_axis_off()
    for ax, name in zip(axes.flat, names, strict=False):
        ax.set_title(name, fontsize=9)
        ax.tick_params(labelsize=7)
        for tag in (tag for tag in tags if tag.endswith("/" + name)):
            scalars = events.Scalars(tag)
            marker = "." if len(scalars) < 20 else None  # a single value is no line
            ax.plot(
                [s.step for s in scalars], [s.value for s in scalars], marker=marker, label=tag.split("/")[0]
            )
        ax.legend(fontsize=7)
    return figure
