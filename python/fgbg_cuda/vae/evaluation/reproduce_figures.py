"""The plots of the reproduction: scores of all runs, and one run's training curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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


def read_curves(log: str | Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) pairs of every scalar in a TensorBoard folder, with all parts of an interrupted run."""
    events = EventAccumulator(str(log))
    events.Reload()
    names = sorted(events.Tags()["scalars"])
    # TensorBoard takes the parts in the order of their names, which hold the second and then the text of a
    # number: parts of the same second may come in any order.
    found = {name: events.Scalars(name) for name in names if "/" in name}
    return {
        name: [(e.step, e.value) for e in sorted(scalars, key=lambda e: (e.step, e.wall_time))]
        for name, scalars in found.items()
    }


def save_curves(path: str | Path, log: str | Path) -> None:
    """Every logged quantity of a run against the training steps."""
    curves = read_curves(log)
    rows = -(-len(curves) // 4)
    figure = Figure(figsize=(3 * 4, 2.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, 4, squeeze=False).flat)
    for ax in axes[len(curves) :]:
        ax.set_axis_off()
    for ax, (name, points) in zip(axes, curves.items(), strict=False):
        ax.plot(*zip(*points, strict=True), lw=1)
        ax.set_title(name, fontsize=9)
    figure.savefig(path, dpi=100)
