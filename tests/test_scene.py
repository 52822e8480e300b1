"""The scene model: its background, its masks, its training; the made scenes and their truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

L = pytest.importorskip("lightning")
pytest.importorskip("skimage")

import tifffile  # noqa: E402

from fgbg_cuda.__main__ import main  # noqa: E402
from fgbg_cuda.vae import CalciumModule, DigitsOnTexture, InputError, SceneModule, SceneVAE  # noqa: E402
from fgbg_cuda.vae.data.scenes import SCENES, Scene, make_scene  # noqa: E402
from fgbg_cuda.vae.models.smoothing import COUPLING, STEPS, smooth_mask  # noqa: E402


def frames_of(scene: Scene) -> torch.Tensor:
    return torch.from_numpy(scene.frames.astype(np.float32) / 255).permute(0, 3, 1, 2)


def background_of(scene: Scene) -> torch.Tensor:
    return torch.from_numpy(scene.background / 255).permute(0, 3, 1, 2)


def started(scene: Scene, **options) -> tuple[SceneVAE, torch.Tensor]:
    x = frames_of(scene)
    model = SceneVAE(shape=tuple(x.shape[1:]), **options)
    model.start(x)
    return model, x


def iou(mask: torch.Tensor, truth: np.ndarray) -> float:
    mask = mask[:, 0].numpy() > 0.5
    return (mask & truth).sum() / (mask | truth).sum()


@pytest.mark.parametrize("name", SCENES)
def test_a_made_scene_is_its_background_wherever_its_mask_is_not_set(name):
    scene = make_scene(name, frames=12, height=60, width=72, seed=3)
    again = make_scene(name, frames=12, height=60, width=72, seed=3)
    other = make_scene(name, frames=12, height=60, width=72, seed=4)
    assert np.array_equal(scene.frames, again.frames)
    assert np.array_equal(scene.mask, again.mask)
    assert not np.array_equal(scene.frames, other.frames)
    assert scene.frames.shape == scene.background.shape == (12, 60, 72, scene.frames.shape[-1])
    assert scene.mask.shape == (12, 60, 72)
    # Away from objects, whose edges are blurred over some pixels, a frame is background and sensor noise.
    from scipy.ndimage import binary_dilation

    away = ~binary_dilation(scene.mask, np.ones((1, 9, 9)))
    rest = (scene.frames.astype(np.float64) - scene.background)[away]
    unit = 255 if scene.frames.dtype == np.uint8 else 4000
    assert abs(rest.mean()) < 0.02 * unit
    assert rest.std() < 0.1 * unit


def test_cells_are_footprints_times_traces():
    scene = make_scene("cells", frames=40, height=60, width=72, seed=0)
    active = np.tensordot(scene.traces.T, scene.footprints, 1)
    assert scene.footprints.max() <= 1
    assert len(scene.footprints) == len(scene.traces) > 10
    assert np.array_equal(scene.mask, active > 0.03 * 4000)
    rest = scene.frames[..., 0] - scene.background[..., 0] - active
    assert abs(rest.mean()) < 10
    assert rest.std() < 200  # shot noise: sqrt(0.0012 * 0.3 to 1) * 4000


def test_the_background_is_that_of_the_scene_behind_objects_too():
    scene = make_scene("static")
    model, x = started(scene)
    error = (model.background(x).detach() - background_of(scene)).abs()
    # The median of 200 frames of noise 0.02 errs by 1.25 * 0.02 / sqrt(200) = 0.002, twice that where objects
    # hide half of the frames.
    assert error.mean() < 0.004
    hidden = torch.from_numpy(scene.mask)[:, None].expand_as(x)
    assert error[hidden].mean() < 0.02
    assert (x - background_of(scene)).abs()[hidden].mean() > 0.1


def test_the_background_follows_the_light():
    scene = make_scene("light")
    truth = background_of(scene)
    error = {
        rank: (m.background(x) - truth).abs().mean()
        for rank in (0, 2)
        for m, x in [started(scene, rank=rank)]
    }
    assert error[2] < 0.03 < error[0]


def test_what_stops_is_no_change_of_the_background():
    """An object that stands in a third of the frames is at first their main component, and still left out."""
    x = 0.5 + 0.02 * torch.randn(60, 1, 48, 64)
    x[40:, :, 8:32, 8:32] = 0.9
    model = SceneVAE(shape=(1, 48, 64), rank=1)
    model.start(x)
    assert (model.background(x)[50] - 0.5).abs().mean() < 0.01
    model.spread.fill_(torch.inf)  # of itself, without the prior of its changes
    assert (model.background(x)[50, 0, 8:32, 8:32] - 0.5).abs().mean() < 0.01
    with torch.no_grad():
        model._estimate(x)
        model.spread.fill_(torch.inf)
    assert (model.background(x)[50, 0, 8:32, 8:32] - 0.5).abs().mean() > 0.03


def test_the_noise_is_that_of_the_background_alone():
    """A median over the frames takes in something of an object that stands in a third of them."""
    x = 0.4 + 0.05 * torch.randn(100, 1, 48, 64, generator=torch.Generator().manual_seed(0))
    x[67:, :, 8:32, 8:32] += 0.4
    model = SceneVAE(shape=(1, 48, 64), rank=0)
    with torch.no_grad():
        model._estimate(x)
    assert model.noise[0, 8:32, 8:32].mean() > 0.07
    model.start(x)
    # From 67 frames a deviation is known to 0.05 / sqrt(134), and the mean of 576 such to a 24th of that; a
    # few pixels may keep some of the object.
    assert abs(model.noise[0, 8:32, 8:32].mean() - 0.05) < 0.004
    assert (model.mean[0, 8:32, 8:32] - 0.4).abs().mean() < 0.01


@pytest.mark.parametrize(("channels", "size", "rank"), [(1, (40, 48), 0), (3, (33, 45), 2), (1, (9, 11), 1)])
def test_shapes(channels, size, rank):
    x = torch.rand(10, channels, *size)
    model = SceneVAE(shape=(channels, *size), rank=rank)
    model.start(x)
    out = model(x[:3])
    assert out.background.shape == out.foreground.shape == (3, channels, *size)
    assert out.mask_logits.shape == out.nats.shape == (3, 1, *size)
    evidence = model.evidence(out)
    nats = model.reconstruction(out, evidence) + out.kl_fg + model.mask_kl(out)
    nats = nats + model.tone_loss(out, evidence)
    assert nats.shape == (3,)
    nats.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.numel())
    for layer in model.separate(x[:3]):
        assert layer.shape[-2:] == size
        assert layer.min() >= 0
        assert layer.max() <= 1


def test_the_mixture_is_that_of_the_docstring():
    x = torch.rand(8, 2, 16, 16, dtype=torch.float64)
    model = SceneVAE(shape=(2, 16, 16), rank=0, outliers=0.01).double()
    model.start(x)
    out = model(x, sample=False)
    normal = torch.distributions.Normal(model.mean, model.noise)
    p_background = 0.99 * normal.log_prob(x).sum(1, keepdim=True).exp() + 0.01
    m = torch.sigmoid(out.mask_logits)
    expected = -torch.log(m + (1 - m) * p_background).flatten(1).sum(1)
    assert torch.allclose(model.reconstruction(out, out.nats), expected, rtol=1e-12)


def test_evidence_is_what_neighbours_agree_on_and_its_gradient_a_pixels_own():
    x = 0.5 + 0.02 * torch.randn(12, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    x[3, :, 8:16, 8:16] = 0.9
    x[3, :, 11, 11] = 0.5  # inside the object one pixel is as the background
    model = SceneVAE(shape=(1, 24, 24), rank=0)
    model.start(x)
    out = model(x[3:4], sample=False)
    evidence = model.evidence(out)
    assert out.nats[..., 8, 8] > 5 > 0 > out.nats[..., 11, 11]
    assert evidence[..., 8:16, 8:16].min() > 0 > evidence[..., :6, :].max()
    given = torch.randn(evidence.shape, generator=torch.Generator().manual_seed(1))
    of_evidence, of_nats = (
        torch.autograd.grad((given * e).sum(), model.mean, retain_graph=True)[0] for e in (evidence, out.nats)
    )
    assert torch.equal(of_evidence, of_nats)


def test_noise_does_not_depend_on_how_a_batch_is_split():
    x = torch.rand(4, 1, 24, 24)
    model = SceneVAE(shape=(1, 24, 24))
    model.start(x)
    whole = model(x, seed=5)
    part = model(x[2:], seed=5, first=2)
    # The noise is the same to the bit; a convolution rounds otherwise in another batch.
    torch.testing.assert_close(whole.z_fg[0].z[2:], part.z_fg[0].z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [16, 30, 100])
def test_a_window_is_the_frame_at_its_place(window):
    x = torch.rand(12, 1, 24, 40, generator=torch.Generator().manual_seed(0))
    model = SceneVAE(shape=(1, 24, 40))
    model.start(x)
    whole, out = model(x[2:5], seed=7), model(x[2:5], seed=7, window=window)
    height, width = min(24, window), min(40, window)
    places = []
    for k in range(3):
        corners = [(top, left) for top in range(24 - height + 1) for left in range(40 - width + 1)]
        found = [
            np.s_[:, top : top + height, left : left + width]
            for top, left in corners
            if torch.equal(whole.x[k, :, top : top + height, left : left + width], out.x[k])
        ]
        assert len(found) == 1
        for name in ("background", "nats"):  # found from the whole frame, whatever the window
            assert torch.equal(getattr(whole, name)[k][found[0]], getattr(out, name)[k])
        places += found
    assert len(set(map(str, places))) == (1 if window == 100 else 3)
    part = model(x[3:5], seed=7, first=1, window=window)  # as processes have them
    assert torch.equal(part.x, out.x[1:])
    other = model(x[2:5], seed=8, window=window)
    assert torch.equal(other.x, out.x) == (window == 100)


def test_smoothing_is_the_mean_field_of_the_docstring():
    torch.manual_seed(0)
    logits, x = 3 * torch.randn(2, 1, 5, 6), torch.rand(2, 3, 5, 6)
    found = smooth_mask(logits, x)

    def neighbours(y: int, z: int):
        for dy in (-1, 0, 1):
            for dz in (-1, 0, 1):
                if dy or dz:  # beyond the edge stands the edge
                    yield min(max(y + dy, 0), 4), min(max(z + dz, 0), 5), math.hypot(dy, dz)

    for b in range(2):
        pixels = [(y, z) for y in range(5) for z in range(6)]
        apart = [
            float((x[b, :, y, z] - x[b, :, v, w]).square().sum())
            for y, z in pixels
            for v, w, _ in neighbours(y, z)
        ]
        variance = 4 * sum(apart) / len(apart)
        mask = torch.sigmoid(logits[b, 0]).double()
        for _ in range(STEPS):
            new = torch.empty_like(mask)
            for y, z in pixels:
                pull = sum(
                    COUPLING
                    / distance
                    * math.exp(-float((x[b, :, y, z] - x[b, :, v, w]).square().sum()) / (2 * variance))
                    * (2 * float(mask[v, w]) - 1)
                    for v, w, distance in neighbours(y, z)
                )
                new[y, z] = 1 / (1 + math.exp(-float(logits[b, 0, y, z]) - pull))
            mask = new
        # Float32 through 8 steps of 8 neighbours, whose pulls of up to 55 nats a sigmoid flattens.
        assert torch.allclose(found[b, 0].double(), mask, atol=1e-4)


def test_smoothing_stops_at_an_edge_of_the_image():
    x = torch.zeros(1, 1, 12, 12)
    x[..., 6:] = 1
    logits = torch.where(x > 0, 1.0, -1.0)
    logits[..., 3, 8], logits[..., 8, 2] = -2, 2  # one pixel of each side says otherwise
    assert torch.equal(smooth_mask(logits, x) > 0.5, x > 0)


def test_what_cannot_be_right_is_said():
    model = SceneVAE(shape=(1, 24, 32))
    with pytest.raises(
        InputError, match="the frames are 1 x 24 x 24, but the model knows a scene of 1 x 24 x 32"
    ):
        model(torch.rand(1, 1, 24, 24))
    with pytest.raises(InputError, match="the frames are 1 x 24 x 24"):
        model.start(torch.rand(9, 1, 24, 24))
    with pytest.raises(InputError, match=r"has 3 frames to start from.*expected at least 4"):
        model.start(torch.rand(3, 1, 24, 32))
    for option, value in {"outliers": 0.0, "mask_prior": 1.0, "rank": -1, "width": 0}.items():
        with pytest.raises(InputError, match=option):
            SceneVAE(shape=(1, 24, 24), **{option: value})
    trainer = L.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    data = DigitsOnTexture(size=32, train=64, val=4, test=4)
    with pytest.raises(InputError, match="DigitsOnTexture has no method frames"):
        trainer.fit(SceneModule(shape=(1, 32, 32)), datamodule=data)
    trainer = L.Trainer(precision="bf16-true", accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(InputError, match=r"precision is bf16-true.*expected 32-true"):
        trainer.fit(SceneModule(shape=(1, 32, 32)), datamodule=data)


def test_a_movie_in_which_nothing_changes_is_its_background():
    frame = torch.rand(1, 1, 24, 32, generator=torch.Generator().manual_seed(0))
    x = frame.repeat(8, 1, 1, 1)
    model = SceneVAE(shape=(1, 24, 32))
    model.start(x)
    torch.testing.assert_close(model.background(x), x)


@pytest.mark.parametrize("preset", ["video", "calcium"])
def test_crops_of_a_scene_are_refused(preset, tmp_path, capsys):
    movie = tmp_path / "movie.npy"
    np.save(movie, np.random.default_rng(0).integers(0, 256, (9, 24, 32), np.uint8))
    with pytest.raises(SystemExit) as ended:
        main(
            ["fit", "--config", preset, "--data.images", str(movie), "--out", str(tmp_path / "run"),
             "--data.crop", "16", "--trainer.accelerator", "cpu"]
        )  # fmt: skip
    assert ended.value.code == 2
    assert "crop is 16, but a model of one scene learns from whole frames" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("frame", "count"),
    [((1, 1024, 1024), 200), ((1, 2048, 2048), 64), ((3, 2160, 3840), 10), ((3, 9000, 9000), 4)],
)
def test_a_model_starts_from_as_many_frames_as_memory_holds_and_says_if_these_are_few(frame, count):
    module = SceneModule(shape=(1, 24, 32), rank=2)
    frame = torch.empty(frame, device="meta")
    if count < 40:
        with pytest.warns(UserWarning, match=f"the background is found from only {count} of them"):
            assert module.how_many(frame) == count
    else:
        assert module.how_many(frame) == count
    assert (
        CalciumModule(shape=(1, 24, 32)).how_many(frame) == 500
    )  # a cell may be active in a few frames alone


@pytest.mark.parametrize("large", [False, True])
def test_video_preset_separates_a_movie(large, tmp_path, capsys, monkeypatch):
    scene = make_scene("static", frames=120, height=92, width=124, seed=1)
    movie, out = tmp_path / "movie.tif", tmp_path / "run"
    tifffile.imwrite(movie, scene.frames, photometric="rgb")
    arguments = [
        "fit", "--config", "video", "--data.images", str(movie), "--out", str(out),
        "--trainer.max_epochs", "2", "--trainer.limit_train_batches", "10", "--trainer.accelerator", "cpu",
    ]  # fmt: skip
    if large:  # too much so for whole frames to be trained on, and for 200 of them to be started from
        arguments += ["--model.window", "64"]
        monkeypatch.setattr(SceneModule, "start_values", 40 * scene.frames[0].size)
    start, started = SceneVAE.start, []
    monkeypatch.setattr(SceneVAE, "start", lambda self, x: (started.append(len(x)), start(self, x))[1])
    main(arguments)
    assert started == [40 if large else 113]
    assert "next: fgbg separate" in capsys.readouterr().out
    before = torch.load(out / "last.ckpt")
    main([*arguments, "--resume"])
    after = torch.load(out / "last.ckpt")
    for name in ("model.mean", "model.noise"):  # what a run starts from is not found anew when it goes on
        assert torch.equal(before["state_dict"][name], after["state_dict"][name])

    main(["separate", str(out / "last.ckpt"), str(movie), str(tmp_path / "layers"), "--device", "cpu"])
    layers = {
        name: tifffile.imread(tmp_path / "layers" / f"{name}.tif")
        for name in ("mask", "foreground", "background")
    }
    found = layers["mask"] > 127
    assert (found & scene.mask).sum() / (found | scene.mask).sum() > 0.9
    # In front is the image itself (but for the few values that intensity_range auto clips), and black where
    # nothing is.
    certain = layers["mask"] == 255
    assert (layers["foreground"][certain] == scene.frames[certain]).mean() > 0.99
    assert layers["foreground"][layers["mask"] == 0].max() == 0
    error = np.abs(layers["background"].astype(float) - scene.background)
    assert error[scene.mask].mean() < 10
