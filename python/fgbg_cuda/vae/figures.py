"""The picture that shows a separation."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from .models import Separation

COLUMNS = ("input", "foreground", "background", "mask", "composite", "truth")


def save_separation(path: str | Path, image: Tensor, found: Separation, truth: Tensor) -> None:
    """One row per image [B, C, H, W] (C 1 or 3): input, the layers found, and the true mask.

    The foreground is shown through its mask, on black.
    """
    columns = (
        image,
        found.foreground * found.mask,
        found.background,
        found.mask,
        found.composite,
        truth.float(),
    )
    rows = len(image)
    figure = Figure(figsize=(1.3 * len(columns), 1.3 * rows + 0.3), layout="constrained")
    FigureCanvasAgg(figure)  # no display needed, and pyplot's global state left alone
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for j, (title, column) in enumerate(zip(COLUMNS, columns, strict=True)):
        axes[0, j].set_title(title, fontsize=9)
        for i in range(rows):
            picture = column[i].detach().cpu().float().permute(1, 2, 0).clamp(0, 1).numpy()
            axes[i, j].imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes[i, j].set_axis_off()
    figure.savefig(path, dpi=120)
