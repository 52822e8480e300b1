"""``fgbg reproduce movies``: the peers, the scores, the table."""

from __future__ import annotations

import json
from importlib.util import find_spec

import numpy as np
import pytest

pytest.importorskip("lightning")
pytest.importorskip("skimage")

from fgbg_cuda.vae import InputError
from fgbg_cuda.vae.commands.movies import (
    activity_scores,
    cells_found,
    iou,
    reproduce_movies,
    table,
)
from fgbg_cuda.vae.data import scenes
from fgbg_cuda.vae.data.scenes import PICTURES, make_scene
from fgbg_cuda.vae.evaluation import peers


@pytest.mark.parametrize("method", [peers.median_and_mad, peers.robust_pca, peers.mog2, peers.knn])
def test_what_moves_is_found(method):
    if method in (peers.mog2, peers.knn) and not find_spec("cv2"):
        pytest.skip("OpenCV is not installed")
    rng = np.random.default_rng(0)
    movie = (
        0.3
        + 0.02 * rng.standard_normal((60, 40, 256, 1), np.float32)
        + 0.2 * rng.random((40, 256, 1), np.float32)
    )
    truth = np.zeros(movie.shape[:3], bool)
    for t in range(60):
        # Large beside windows of 5 and 7 pixels, and nowhere for a tenth of the time, or it were background.
        truth[t, 8:32, 4 * t : 4 * t + 16] = True
    movie[truth] = 0.9
    assert iou(method(movie), truth) > 0.8


@pytest.mark.parametrize("method", peers.THRESHOLDS.values())
def test_what_stands_out_is_found(method):
    light = np.linspace(0.1, 0.2, 80, dtype=np.float32)
    stills = np.tile(light[:, None], (2, 80, 1, 1))
    truth = np.zeros(stills.shape[:3], bool)
    truth[0, 20:40, 30:50] = truth[1, 50:65, 10:30] = True
    stills[truth] += 0.5
    stills += 0.02 * np.random.default_rng(0).standard_normal(stills.shape, np.float32)
    assert iou(method(stills), truth) > 0.98


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_has_objects_brighter_than_what_is_around_them(name):
    if name == "nuclei" and not find_spec("stardist"):
        pytest.skip("stardist, which ships the nuclei, is not installed")
    scene = make_scene(name)
    assert scene.frames.shape == (*scene.mask.shape, 1)
    assert 0.15 < scene.mask.mean() < 0.4
    inside = scene.frames[scene.mask].mean()
    assert inside > 1.5 * scene.frames[~scene.mask].mean()


def test_a_picture_that_is_not_there_is_said_before_any_training(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="nuclei: needs the picture that stardist ships"):
        reproduce_movies(tmp_path, ("small", "nuclei"), (0,))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("method", peers.ACTIVITIES.values())
def test_what_lights_up_is_found(method):
    scene = make_scene("cells", frames=80, height=48, width=64)
    scores = activity_scores(method((scene.frames / scene.frames.max()).astype(np.float32)), scene)
    base = scene.mask.mean()
    assert scores["ap"] > 3 * base  # of chance
    assert scores["traces"] > 0.5


def test_scores_of_the_truth_are_perfect():
    scene = make_scene("cells", frames=60, height=48, width=64)
    truth = np.tensordot(scene.traces.T, scene.footprints, 1)
    assert activity_scores(truth, scene)["ap"] == 1
    assert activity_scores(truth, scene)["correlation"] == pytest.approx(1)
    active = int(scene.traces.any(1).sum())
    assert cells_found(scene.footprints[scene.traces.any(1)], scene) == {
        "found": active,
        "missed": 0,
        "false": 0,
    }
    nothing = np.zeros((3, 48, 64), np.float32)
    assert cells_found(nothing, scene) == {"found": 0, "missed": active, "false": 3}
    assert iou(scene.mask, scene.mask) == 1


def test_movies_are_made_trained_on_scored_and_drawn(tmp_path):
    short = (
        "--trainer.max_epochs",
        "1",
        "--trainer.limit_train_batches",
        "2",
        "--trainer.accelerator",
        "cpu",
    )
    options = {"frames": 60, "size": (64, 80), "options": (*short, "--pictures", "0")}
    names = ("small", "cells", "crowd")
    results = reproduce_movies(tmp_path, names, (0,), **options)
    methods = {(r["scene"], r["method"]) for r in results}
    assert {("small", "video"), ("small", "robust PCA"), ("cells", "calcium"), ("cells", "NMF")} <= methods
    assert {("crowd", "crowd"), ("crowd", "Otsu"), ("crowd", "top-hat and Otsu")} <= methods
    for name in names:
        assert (tmp_path / name / "seed-0" / "masks.png").stat().st_size > 5_000
    assert json.loads((tmp_path / "results.json").read_text()) == results
    written = (tmp_path / "table.md").read_text()
    assert written == table(results)
    assert "| method | small |" in written
    assert "| method | crowd |" in written
    assert "| method | ap | correlation | traces | found | missed | false |" in written
    again = reproduce_movies(tmp_path, names, (0,), **options)
    assert again == results  # read, not run: the seconds are the same
