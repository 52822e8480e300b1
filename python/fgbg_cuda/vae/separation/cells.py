"""The cells that a model of calcium imaging found, as files."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

CELL_FILES = ("cells.npz", "cells.png")


def save_cells(folder: str | Path, footprints: np.ndarray, traces: np.ndarray) -> None:
    """Writes ``cells.npz`` and ``cells.png`` into ``folder``.

    The file holds ``footprints`` [N, H, W], at most 1, and ``traces`` [N, T]: what a cell adds to a frame
    where its footprint is 1, in units of the intensity range of the training. The picture shows the
    footprints' outlines, each with its number, and the traces.
    """
    folder = Path(folder)
    np.savez_compressed(folder / "cells.npz", footprints=footprints, traces=traces)
    figure = Figure(figsize=(12, 6), layout="constrained")
    place, time = figure.subplots(1, 2)
    place.imshow(footprints.max(0) if len(footprints) else np.zeros(footprints.shape[1:]), cmap="gray")
    place.set_axis_off()
    colours = matplotlib.colormaps["hsv"](np.arange(len(footprints)) * 0.381966 % 1)  # neighbours differ
    step = 1.2 * np.quantile(traces, 0.999) if traces.size else 1
    for k, (footprint, trace, colour) in enumerate(zip(footprints, traces, colours, strict=True)):
        place.contour(footprint, [0.3], colors=[colour], linewidths=0.8)
        y, x = np.unravel_index(footprint.argmax(), footprint.shape)
        place.text(x, y, str(k), color=colour, fontsize=6, ha="center", va="center")
        time.plot(trace / step - k, color=colour, linewidth=0.6)
    time.set_xlabel("frame")
    time.set_ylabel("cell")
    time.set_yticks(-np.arange(0, len(footprints), 10), np.arange(0, len(footprints), 10))
    figure.savefig(folder / "cells.png", dpi=150)
