"""The worked examples run, learn, and say what they find."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_pytorch_is_short_and_learns(capsys):
    assert len((EXAMPLES / "plain_pytorch.py").read_text().splitlines()) <= 60
    load("plain_pytorch").main(steps=100)
    lines = capsys.readouterr().out.splitlines()
    elbo = [float(re.search(r"ELBO\s+(\S+) nats", line).group(1)) for line in lines]
    assert len(elbo) == 6
    assert elbo[-1] > elbo[0]


def test_plain_pytorch_makes_what_it_says():
    torch.manual_seed(0)
    images, masks = load("plain_pytorch").make_images(200)
    assert images.shape == masks.shape == (200, 1, 32, 32)
    area = masks.float().mean((1, 2, 3))
    assert (area > np.pi * 3**2 / 32**2).all()  # a radius of 4 pixels or more, less the grid's error
    assert (area < np.pi * 8**2 / 32**2).all()


@pytest.fixture
def nuclei(monkeypatch):
    for package in ("lightning", "skimage", "sklearn", "stardist"):
        pytest.importorskip(package) if package != "stardist" else None
    if importlib.util.find_spec("stardist") is None:
        pytest.skip("stardist, which ships the nuclei, is not installed")
    return load("separate_movie")


def test_the_movie_is_what_its_truth_says(nuclei):
    movie, background, mask = nuclei.make_movie("left", 60, seed=0)
    assert movie.dtype == np.uint16
    assert movie.shape == background.shape == mask.shape == (60, 64, 64)
    light = (movie.astype(float) - nuclei.BLACK) / (nuclei.WHITE - nuclei.BLACK)
    outside = (light - background)[~mask]
    assert abs(outside.mean()) < 0.005  # noise alone, slightly lifted where the camera counts no less than 0
    assert outside.std() == pytest.approx(0.02, rel=0.05)
    for frame in range(60):
        assert (light - background)[frame][mask[frame]].mean() > 0.2
    again = nuclei.make_movie("left", 60, seed=0)
    assert all(np.array_equal(a, b) for a, b in zip((movie, background, mask), again, strict=True))


def test_training_and_scoring_share_no_nucleus(nuclei):
    left, right = nuclei.nuclei("left"), nuclei.nuclei("right")
    assert min(len(left), len(right)) > 20
    seen = {light.tobytes() for light, _ in left}
    assert not any(light.tobytes() in seen for light, _ in right)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated", "ignore:.*does not have many workers")
def test_the_example_runs_to_its_end(nuclei, tmp_path, capsys):
    scores = nuclei.main(["--out", str(tmp_path), "--frames", "100", "--epochs", "1", "--width", "8"])
    assert all(np.isfinite(value) for value in scores.values())
    assert (tmp_path / "separation.png").stat().st_size > 0
    assert "mask IoU" in capsys.readouterr().out
