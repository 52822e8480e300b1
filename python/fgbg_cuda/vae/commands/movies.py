"""``fgbg reproduce movies``: models and classical methods on movies and stills with the truth."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import average_precision_score

from ..data.scenes import PICTURES, SCENES, Scene, make_scene
from ..evaluation.figures import montage, save_film
from ..evaluation.peers import ACTIVITIES, MASKS, THRESHOLDS
from ..separation.writers import LAYERS
from .fit import main as fit
from .separate import main as separate

# What a scene is trained with and compared with, where it is not the video of a camera that stands still.
PRESETS = {"cells": "calcium", "crowd": "crowd", "nuclei": "crowd", "coins": "crowd"}
PEERS = {"video": MASKS, "calcium": ACTIVITIES, "crowd": THRESHOLDS}
CELL_SCORES = ("ap", "correlation", "traces", "found", "missed", "false")
SEEDS = (0, 1, 2)
SHOWN = 0.75  # of the movie: the frame in the pictures
FILM = 60  # frames


def iou(mask: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of masks, over the whole movie."""
    return float((mask & truth).sum() / max((mask | truth).sum(), 1))


def activity_scores(activity: np.ndarray, scene: Scene) -> dict[str, float]:
    """How well activity [T, H, W] tells where and how much cells are active.

    ``ap``: average precision of the pixels of :attr:`Scene.mask`; ``correlation`` with what the cells add;
    ``traces``: the median correlation of a cell's trace with the mean activity in its footprint.
    """
    truth = np.tensordot(scene.traces.T, scene.footprints, 1)
    inside = scene.footprints > 0.3
    traces = [
        np.corrcoef(activity[:, where].mean(1), trace)[0, 1]
        for where, trace in zip(inside, scene.traces, strict=True)
        if where.any() and trace.any()
    ]
    some = slice(None, None, 5)
    return {
        "ap": float(average_precision_score(scene.mask[some].ravel(), activity[some].ravel())),
        "correlation": float(np.corrcoef(activity[some].ravel(), truth[some].ravel())[0, 1]),
        "traces": float(np.median(np.nan_to_num(traces))),
    }


def cells_found(footprints: np.ndarray, scene: Scene) -> dict[str, int]:
    """Of the active cells, those with a footprint whose cosine with theirs is above 1/2; and the rest."""
    true = scene.footprints[scene.traces.any(1)]
    a, b = (values.reshape(len(values), -1) for values in (footprints, true))
    a, b = (values / np.linalg.norm(values, axis=1, keepdims=True).clip(1e-12) for values in (a, b))
    agreement = a @ b.T
    found = int((agreement[linear_sum_assignment(-agreement)] > 0.5).sum())
    return {"found": found, "missed": len(true) - found, "false": len(footprints) - found}


def reproduce_movies(
    out: str | Path = "runs/movies",
    scenes: tuple[str, ...] = (*SCENES, *PICTURES),
    seeds: tuple[int, ...] = SEEDS,
    frames: int = 200,
    size: tuple[int, int] = (120, 160),
    options: tuple[str, ...] = (),
) -> list[dict[str, Any]]:
    """Makes each scene with each seed, separates it by a model trained on it and by each peer; scores both.

    (The seed of a picture that comes with a package is that of the training alone.)

    Writes ``table.md``, ``results.json``, and for each scene and seed the movie, the run, the layers,
    ``masks.png`` and, unless it is one picture, a ``film.gif`` of the layers under ``out/SCENE/seed-N``. A
    run that has its results is not run again.

    Args:
        options: further ones of ``fgbg fit``.

    Returns:
        One dict for each scene, seed and method, with its scores.

    Raises:
        InputError: a picture is not there.
    """
    for name in set(scenes) & set(PICTURES):
        make_scene(name)  # says what is missing before the training of the others
    results = []
    for name in scenes:
        for seed in seeds:
            folder = Path(out) / name / f"seed-{seed}"
            done = folder / "result.json"
            if not done.exists():
                folder.mkdir(parents=True, exist_ok=True)
                scored = _one_movie(folder, name, make_scene(name, frames, *size, seed), seed, options)
                done.write_text(json.dumps(scored, indent=2) + "\n")
            results += [
                {"scene": name, "seed": seed, "method": method, **scores}
                for method, scores in json.loads(done.read_text()).items()
            ]
    (Path(out) / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (Path(out) / "table.md").write_text(table(results))
    return results


def _one_movie(
    folder: Path, name: str, scene: Scene, seed: int, options: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    movie = folder / "movie.tif"
    tifffile.imwrite(
        movie, scene.frames.squeeze(-1) if scene.frames.shape[-1] == 1 else scene.frames,
        photometric="rgb" if scene.frames.shape[-1] == 3 else "minisblack",
    )  # fmt: skip
    of_cells = scene.footprints is not None
    preset = PRESETS.get(name, "video")
    started = time.monotonic()
    run = ["--data.images", str(movie), "--out", str(folder / "run"), "--seed_everything", str(seed)]
    fit(["fit", "--config", preset, *run, *options])
    separate([str(folder / "run" / "best.ckpt"), str(movie), str(folder / "layers"), "--overwrite"])
    seconds = time.monotonic() - started
    layers = {
        layer: tifffile.imread(folder / "layers" / f"{layer}.tif").reshape(*scene.mask.shape, -1)
        for layer in LAYERS
    }
    values = scene.frames / scene.frames.max()
    if len(values) > 1:
        shown = (scene.frames, *layers.values())
        shown = [np.round(255 * (x[:FILM] / x.max())).astype(np.uint8) for x in shown]
        save_film(folder / "film.gif", shown)
    if of_cells:
        found = {preset: layers["foreground"][..., 0].astype(float)}
    else:
        found = {preset: layers["mask"][..., 0] > 127}
    for method, find in PEERS[preset].items():
        found[method] = find(values.astype(np.float32))
    scores = {
        method: activity_scores(result, scene) if of_cells else {"iou": iou(result, scene.mask)}
        for method, result in found.items()
    }
    if of_cells:
        scores[preset] |= cells_found(np.load(folder / "layers" / "cells.npz")["footprints"], scene)
    scores[preset]["seconds"] = seconds
    t = int(SHOWN * len(values))
    shown = [torch.from_numpy(values[t]).permute(2, 0, 1).float()]
    for picture in (scene.mask, *found.values()):
        picture = picture[t].astype(np.float32)
        shown.append(torch.from_numpy(picture / max(picture.max(), 1e-9))[None])
    montage([shown], ["movie", "truth", *found]).savefig(folder / "masks.png", dpi=120)
    return scores


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table for the scenes of each preset: a row for each method, means over the seeds."""
    lines = []
    for preset in PEERS:
        rows = [result for result in results if PRESETS.get(result["scene"], "video") == preset]
        if not rows:
            continue
        keys = CELL_SCORES if preset == "calcium" else ("iou",)
        scenes = list(dict.fromkeys(row["scene"] for row in rows))
        columns = [(scene, key) for scene in scenes for key in keys]
        titles = [scene if len(keys) == 1 else key for scene, key in columns]
        lines += ["| " + " | ".join(["method", *titles]) + " |", "|---" * (1 + len(columns)) + "|"]
        for method in dict.fromkeys(row["method"] for row in rows):
            cells = []
            for scene, key in columns:
                values = [
                    row[key]
                    for row in rows
                    if (row["method"], row["scene"]) == (method, scene) and key in row
                ]
                cells.append(f"{statistics.mean(values):.3g}" if values else "")
            lines.append("| " + " | ".join([method, *cells]) + " |")
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="fgbg reproduce movies", description=__doc__)
    parser.add_argument("--out", type=os.path.expanduser, default="runs/movies", help="folder of the results")
    every = (*SCENES, *PICTURES)
    parser.add_argument("--scenes", nargs="+", choices=every, default=every)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    options = parser.parse_args(argv)
    results = reproduce_movies(options.out, tuple(options.scenes), tuple(options.seeds))
    print(f"\n{table(results)}\nsee {options.out}/")
