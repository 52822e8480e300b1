"""A result as pictures beside its JSON file: time against size, and percent of the copy's speed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .tables import ordered, peers_of, share_of_copy

COLORS = dict(
    zip(
        ("ours", "eager", "compile", "triton", "ours, graph", "compile, graph", "ours, no cache"),
        ("tab:blue", "tab:gray", "tab:orange", "tab:green", "tab:cyan", "tab:red", "tab:purple"),
        strict=True,
    )
)
STYLES = {"float32": "-", "bfloat16": "--", "float16": ":"}


def plot_path(result_path: Path, kind: str) -> Path:
    return result_path.with_name(f"{result_path.stem}-{kind}.png")


def write_plots(result: dict, result_path: Path) -> list[Path]:
    """Writes the plots of the ops and of the growth with size, and says where."""
    speed = result["copy"]["bytes_per_second"]
    written = []
    for section in ("ops", "growth"):
        rows = result["sections"].get(section)
        if rows:
            kinds = {
                "time": (lambda row, peer: row["peers"][peer]["median"] * 1e6, "µs"),
                "limit": (lambda row, peer: 100 * share_of_copy(row, peer, speed), "% of copy speed"),
            }
            for kind, (value, unit) in kinds.items():
                path = plot_path(result_path, kind if section == "ops" else f"{section}-{kind}")
                _figure(rows, value, unit, kind).savefig(path, dpi=100)
                written.append(path)
    return written


def _figure(rows: list[dict], value: Callable[[dict, str], float], unit: str, kind: str) -> Figure:
    """One panel for each op."""
    panels: dict[str, list[dict]] = {}
    for row in ordered(rows):
        panels.setdefault(row["op"], []).append(row)
    columns = min(4, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * lines + 0.5), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis, (op, found) in zip(axes, panels.items(), strict=False):
        _panel(axis, found, value)
        axis.set_title(op, fontsize=9)
        if kind == "limit":
            axis.set_yscale("linear")
            axis.set_ylim(bottom=0)
            axis.axhline(100, color="black", linewidth=0.6)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.supxlabel("elements", fontsize=9)
    figure.supylabel(unit, fontsize=9)
    handles = {
        label: h for axis in figure.axes for h, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles, loc="outside upper center", ncols=min(6, len(handles)), fontsize=8
    )
    return figure


def _panel(axis: Axes, rows: list[dict], value: Callable[[dict, str], float]) -> None:
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for peer in peers_of(rows):
            points = [
                (math.prod(r["size"]), value(r, peer))
                for r in rows
                if r["dtype"] == dtype and peer in r["peers"]
            ]
            if points:
                label = peer if dtype == "float32" else f"{peer}, {dtype}"
                style = {"color": COLORS[peer], "linestyle": STYLES[dtype], "marker": ".", "linewidth": 1.2}
                axis.plot(*zip(*points, strict=True), label=label, **style)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.grid(alpha=0.3)
    axis.tick_params(which="both", labelsize=7)
