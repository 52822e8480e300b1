"""The model of calcium imaging: the cells it finds, their traces, its layers, its files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

L = pytest.importorskip("lightning")
pytest.importorskip("skimage")

import tifffile  # noqa: E402
from scipy.optimize import linear_sum_assignment  # noqa: E402

from fgbg_cuda.__main__ import main  # noqa: E402
from fgbg_cuda.vae import CalciumModel, InputError  # noqa: E402
from fgbg_cuda.vae.data.scenes import Scene, make_scene  # noqa: E402


@pytest.fixture(scope="module")
def scene() -> Scene:
    return make_scene("cells", frames=200, height=64, width=80, seed=1)


@pytest.fixture(scope="module")
def frames(scene) -> torch.Tensor:
    x = torch.from_numpy(scene.frames.astype(np.float32)).permute(0, 3, 1, 2)
    return x / x.max()


@pytest.fixture(scope="module")
def model(frames) -> CalciumModel:
    model = CalciumModel(shape=tuple(frames.shape[1:]))
    model.start(frames)
    return model


def matches(found: np.ndarray, truth: np.ndarray) -> list[tuple[int, int]]:
    """Pairs (found, true) of footprints whose cosine is above 1/2, each in one pair at most."""
    a, b = (values.reshape(len(values), -1) for values in (found, truth))
    a, b = (values / np.linalg.norm(values, axis=1, keepdims=True) for values in (a, b))
    rows, columns = linear_sum_assignment(-(a @ b.T))
    return [(i, j) for i, j in zip(rows, columns, strict=True) if a[i] @ b[j] > 0.5]


def test_cells_are_found_with_their_traces(model, frames, scene):
    footprints, traces = model.cells().numpy(), model(frames).traces.numpy()
    assert np.allclose(footprints.max((1, 2)), 1)
    assert footprints.min() >= 0
    pairs = matches(footprints, scene.footprints)
    active = scene.traces.max(1) > 0.1 * 4000  # the least: three times the noise of a pixel
    assert len(pairs) >= 0.8 * active.sum()
    assert len(footprints) - len(pairs) <= 2
    agreement = [np.corrcoef(traces[:, i], scene.traces[j])[0, 1] for i, j in pairs]
    assert np.median(agreement) > 0.9


def test_traces_are_the_non_negative_least_squares(model, frames):
    from scipy.optimize import nnls

    activity = model.activity(frames[::40])
    found = model._solved(model.footprints.detach(), activity)
    for frame, traces in zip(activity.double().flatten(1).numpy(), found.numpy(), strict=True):
        exact, _ = nnls(model.footprints.detach().flatten(1).T.double().numpy(), frame)
        # Coordinate descent: cells overlap little (those with a cosine above 0.6 are made one), so that each
        # of the 10 sweeps takes off more than half of the error.
        assert np.allclose(traces, exact, atol=2**-10 * exact.max())


def test_layers_add_up(model, frames):
    x = frames[50:54]
    found = model.separate(x)
    over = x - found.background
    assert torch.allclose(found.mask * over, found.foreground, atol=1e-6)
    for layer in found:
        assert layer.min() >= 0
        assert layer.max() <= 1


def test_a_checkpoint_brings_its_cells(model, frames):
    other = CalciumModel(shape=tuple(frames.shape[1:]))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(frames[:2]).cells, model(frames[:2]).cells)


def test_footprints_learn(model, frames):
    nats = model.reconstruction(model(frames[:4])).sum()
    (gradient,) = torch.autograd.grad(nats, model.footprints)
    assert gradient.abs().sum() > 0
    assert not gradient[~model.support].any()


def test_a_movie_without_cells():
    x = 0.5 + 0.01 * torch.randn(40, 1, 32, 32)
    model = CalciumModel(shape=(1, 32, 32))
    model.start(x)
    assert len(model.footprints) <= 2  # chance
    model.footprints = torch.nn.Parameter(model.footprints[:0])
    model.support = model.support[:0]
    assert not model(x[:2]).cells.any()
    assert model(x[:2]).traces.shape == (2, 0)
    with pytest.warns(UserWarning, match="no cell of about 7 pixels across was found"):
        model.start(torch.full((40, 1, 32, 32), 0.5))
    assert len(model.footprints) == 0


def test_black_edges_are_no_pixels_without_noise(model, frames, scene):
    """As motion correction leaves them: else all that changes would stand out from them, and be a cell."""
    x = torch.nn.functional.pad(frames, (40, 40, 32, 32))
    edged = CalciumModel(shape=tuple(x.shape[1:]))
    edged.start(x)
    torch.testing.assert_close(edged.noise, model.noise)
    found = edged.cells()[:, 32:-32, 40:-40].numpy()
    assert len(found) < 2 * len(model.footprints)  # nine times as many, were the edges counted
    assert len(matches(found, scene.footprints)) >= 0.8 * len(
        matches(model.cells().numpy(), scene.footprints)
    )


def test_a_movie_in_which_most_pixels_keep_their_value():
    """As one of few photons or gray levels: the noise is not 0, by which the loss divides."""
    x = torch.zeros(40, 1, 32, 32)
    x[::5, :, 12:19, 12:19] = 0.5
    model = CalciumModel(shape=(1, 32, 32))
    model.start(x)
    assert model.noise > 0
    assert torch.isfinite(model.reconstruction(model(x))).all()


def test_what_cannot_be_right_is_said():
    with pytest.raises(InputError, match="3 channels, expected 1"):
        CalciumModel(shape=(3, 32, 32))
    with pytest.raises(InputError, match="cell is 0"):
        CalciumModel(shape=(1, 32, 32), cell=0)
    with pytest.raises(InputError, match="cell is 22, but the frames are 40 x 32"):
        CalciumModel(shape=(1, 40, 32), cell=22)
    with pytest.raises(InputError, match="the frames are 1 x 32 x 24"):
        CalciumModel(shape=(1, 32, 32))(torch.rand(1, 1, 32, 24))
    with pytest.raises(InputError, match="the frames are 1 x 32 x 24"):
        CalciumModel(shape=(1, 32, 32)).start(torch.rand(9, 1, 32, 24))
    with pytest.raises(InputError, match=r"has 1 frames to start from.*expected at least 2"):
        CalciumModel(shape=(1, 32, 32)).start(torch.rand(1, 1, 32, 32))


def test_calcium_preset_writes_layers_and_cells(scene, tmp_path, capsys):
    movie, out, layers = tmp_path / "movie.tif", tmp_path / "run", tmp_path / "layers"
    tifffile.imwrite(movie, scene.frames[..., 0], imagej=True, metadata={"axes": "TYX"})
    main(
        ["fit", "--config", "calcium", "--data.images", str(movie), "--out", str(out),
         "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "4", "--trainer.accelerator", "cpu"]
    )  # fmt: skip
    assert "next: fgbg separate" in capsys.readouterr().out
    main(["separate", str(out / "best.ckpt"), str(movie), str(layers), "--device", "cpu"])
    cells = np.load(layers / "cells.npz")
    footprints, traces = cells["footprints"], cells["traces"]
    assert footprints.shape[1:] == (64, 80)
    assert traces.shape == (len(footprints), 200)
    assert (layers / "cells.png").stat().st_size > 10_000
    foreground = tifffile.imread(layers / "foreground.tif").astype(float)
    active = np.tensordot(scene.traces.T, scene.footprints, 1)
    assert np.corrcoef(foreground.ravel(), active.ravel())[0, 1] > 0.8

    for layer in ("foreground", "background", "mask"):
        (layers / f"{layer}.tif").unlink()
    with pytest.raises(SystemExit) as ended:
        main(["separate", str(out / "best.ckpt"), str(movie), str(layers), "--device", "cpu"])
    assert ended.value.code == 2
    assert "cells.npz is there already; --overwrite replaces it" in capsys.readouterr().err
    assert not (layers / "mask.tif").exists()

    # It knows one scene: another size, or a part of it, would be separated by the wrong background.
    small = tmp_path / "small.tif"
    tifffile.imwrite(small, scene.frames[:4, :48, :48, 0], imagej=True, metadata={"axes": "TYX"})
    for arguments, got in (([str(small)], "48 x 48"), ([str(movie), "--tile", "32"], "--tile")):
        with pytest.raises(SystemExit) as ended:
            main(["separate", str(out / "best.ckpt"), *arguments[:1], str(tmp_path / "no"), *arguments[1:]])
        assert ended.value.code == 2
        assert f"knows one scene, in whole frames of 64 x 80, got {got}" in capsys.readouterr().err
