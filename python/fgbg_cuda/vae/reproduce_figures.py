"""The plots of the reproduction: scores of all runs, and one run's training curves."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

SCORES = (
    ("f1_open", "cell F1 in the open"),
    ("f1_covered", "cell F1 under a disc"),
    ("leakage", "leakage: R² of discs from z_fg"),
)


def save_scores(path: str | Path, results: list[dict[str, Any]]) -> None:
    """One panel for each score, one group for each set, one colour for each model, one dot for each run."""
    models = list(dict.fromkeys(r["model"] for r in results))
    sets = list(dict.fromkeys(r["set"] for r in results))
    figure = Figure(figsize=(4 * len(SCORES), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
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


def save_curves(path: str | Path, log: str | Path) -> None:
    """Every logged quantity of a run against the training steps, from Lightning's ``metrics.csv``."""
    with open(log, newline="") as file:
        rows = list(csv.DictReader(file))
    names = sorted(name for name in rows[0] if name not in ("step", "epoch"))
    figure = Figure(figsize=(3 * 4, 2.2 * -(-len(names) // 4)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(-(-len(names) // 4), 4, squeeze=False).flat)
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    for ax, name in zip(axes, names, strict=False):
        points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
        ax.plot(*zip(*points, strict=True), lw=1)
        ax.set_title(name, fontsize=9)
    figure.savefig(path, dpi=100)
