"""Training that is killed, damaged or fed bad numbers: it resumes exactly, or says what is wrong."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

L = pytest.importorskip("lightning")
pytest.importorskip("skimage")
pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")

from lightning.pytorch.callbacks import Callback  # noqa: E402

from fgbg_cuda.__main__ import main  # noqa: E402
from fgbg_cuda.vae import DigitsOnTexture, LayeredVAEModule, NonFiniteLossError, ObjectNetworks, open_images  # noqa: E402
from fgbg_cuda.vae.commands import demo  # noqa: E402
from fgbg_cuda.vae.data import digits as vae_data  # noqa: E402
from fgbg_cuda.vae.data.loaders import ShuffledBatches  # noqa: E402
from fgbg_cuda.vae.training import resume  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated")  # one library on another


def blobs() -> np.ndarray:
    """Stands in for the digits, whose file takes seconds to parse: [5000, 784] in [0, 255]."""
    pixels = np.zeros((5000, 28, 28))
    pixels[:, 8:20, 8:20] = np.random.default_rng(0).uniform(100, 255, (5000, 1, 1))
    return pixels.reshape(5000, 784)


@pytest.fixture(autouse=True)
def no_digits(monkeypatch):
    monkeypatch.setattr(vae_data, "_mnist_pixels", blobs)


def record(losses: list[float]) -> Callback:
    class Record(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            losses.append(outputs["loss"].item())

    return Record()


class KeepAll(resume.AtomicCheckpointIO):
    def remove_checkpoint(self, path):
        pass


def fit(folder: Path, losses: list[float], checkpoint: Path | None = None, seed: int = 0, **options):
    """Two epochs of three steps; returns the parameters and the random state that training ends with."""
    L.seed_everything(seed)
    data = DigitsOnTexture(size=32, train=25, val=4, test=4, batch_size=8)
    module = LayeredVAEModule(networks=ObjectNetworks(width=8), **options)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[resume.ResumeState(), resume.ResumeCheckpoint(folder, seconds=0), record(losses)],
        plugins=[KeepAll()],
        gradient_clip_val=500.0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    state = (torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].astype(np.int64)))  # noqa: NPY002
    return [*module.state_dict().values(), *state], random.getstate()


def equal(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- the same run goes on ----


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_resuming_after_any_step_gives_the_same_losses_and_parameters(tmp_path):
    losses: list[float] = []
    tensors, python_state = fit(tmp_path / "whole", losses)
    checkpoints = sorted((tmp_path / "whole").glob("*.ckpt"))
    assert [int(path.stem.removeprefix("step=")) for path in checkpoints] == [1, 2, 3, 4, 5, 6]
    for step, path in enumerate(checkpoints, 1):
        torch.load(path, weights_only=True)
        rest: list[float] = []
        # Another seed: the random state has to come from the checkpoint.
        again, again_python_state = fit(tmp_path / f"after{step}", rest, path, seed=step)
        assert rest == losses[step:], f"resumed after step {step}"
        assert equal(again, tensors), f"resumed after step {step}"
        assert again_python_state == python_state


def test_order_follows_from_seed_and_epoch():
    def order(seed, epoch, first=0):
        batches = ShuffledBatches(20, 6, seed)
        batches.set_epoch(epoch)
        batches.first = first
        return list(batches), list(batches)

    whole, again = order(0, 2)
    assert whole == again
    assert len(whole) == 3
    assert len({i for batch in whole for i in batch}) == 18
    assert whole != order(0, 1)[0] != order(1, 1)[0]
    assert order(0, 2, first=1) == (whole[1:], whole)  # only the resumed pass starts late


# ---- a process that is killed ----

TINY = {"size": 32, "width": 8, "train": 520, "val": 8, "test": 8, "rows": 1, "epochs": 3}


def train(out: str, resumed: bool, dies_at_checkpoint: int | None = None) -> None:
    """What the child process does. ``dies_at_checkpoint`` n: killed with half of the n-th written."""
    torch.set_num_threads(1)
    vae_data._mnist_pixels = blobs
    if dies_at_checkpoint is not None:
        save, calls = torch.save, iter(range(1, 1000))

        def half_save(checkpoint, file):
            whole = io.BytesIO()
            save(checkpoint, whole)
            done = next(calls) < dies_at_checkpoint
            file.write(whole.getvalue() if done else whole.getvalue()[: whole.tell() // 2])
            if not done:
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)

        torch.save = half_save
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        demo.run(demo.DemoConfig(out=out, checkpoint_seconds=0, **TINY), resumed)


@pytest.fixture(scope="module")
def start():
    """Starts ``train`` in a process of its own; all are forks of one that has the imports behind it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fgbg_cuda.vae.commands.demo", "pytest", "skimage.data"])

    def start(*arguments) -> multiprocessing.Process:
        process = context.Process(target=train, args=arguments, daemon=True)
        process.start()
        return process

    return start


def finish(process) -> int:
    process.join(120)
    return process.exitcode


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    assert finish(start(str(out), False)) == 0
    return out


def assert_same_result(out: Path, uninterrupted: Path) -> None:
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (out, uninterrupted))
    assert ours["test"] == theirs["test"]
    assert ours["steps"] == theirs["steps"] == ours["steps_planned"]
    ours, theirs = (
        torch.load(folder / "layered_vae.ckpt", weights_only=True)["state_dict"]
        for folder in (out, uninterrupted)
    )
    assert equal(ours.values(), theirs.values())
    assert len(list((out / "tensorboard").iterdir())) == 1  # the curves go on in one place too


def steps(out: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step=")) for path in (out / "checkpoints").glob("*.ckpt"))


def test_killed_at_random_moments(start, uninterrupted, tmp_path):
    rng = random.Random(0)
    seconds = json.loads((uninterrupted / "metrics.json").read_text())["seconds"]
    for kill in range(3):
        before = steps(tmp_path)
        process = start(str(tmp_path), kill > 0)
        while process.is_alive() and steps(tmp_path) == before:  # until it has got anywhere
            time.sleep(0.001)
        time.sleep(rng.uniform(0, seconds / 6))
        process.kill()
        assert finish(process) == -signal.SIGKILL
        assert not (tmp_path / "metrics.json").exists()
        assert steps(tmp_path)
    assert finish(start(str(tmp_path), True)) == 0
    assert_same_result(tmp_path, uninterrupted)


def test_killed_while_writing_a_checkpoint_with_another_damaged(start, uninterrupted, tmp_path):
    assert finish(start(str(tmp_path), False, 14)) == -signal.SIGKILL
    checkpoints = sorted((tmp_path / "checkpoints").glob("*.ckpt"))
    # One of the 14 is the model of the first epoch: the half-written one is that of step 13.
    assert steps(tmp_path) == [11, 12]
    assert (tmp_path / "checkpoints" / "unfinished.tmp").stat().st_size > 0
    os.truncate(checkpoints[-1], checkpoints[-1].stat().st_size // 2)
    with pytest.warns(UserWarning, match=r"step=000000012\.ckpt is truncated or corrupt"):
        assert resume.newest_checkpoint(tmp_path / "checkpoints") == checkpoints[0]
    assert finish(start(str(tmp_path), True)) == 0
    assert_same_result(tmp_path, uninterrupted)


def test_resuming_a_finished_run_scores_the_same(start, uninterrupted, tmp_path):
    out = tmp_path / "finished"
    shutil.copytree(uninterrupted, out)
    assert max(steps(out)) == 24  # no step is left to train
    (out / "metrics.json").unlink()
    assert finish(start(str(out), True)) == 0
    assert_same_result(out, uninterrupted)


# ---- checkpoints that are no good ----


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"\x3f\x80" * 8)] ^= 1  # inside a tensor, where only a checksum sees it
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, 0),
        lambda path: os.truncate(path, 100),
        lambda path: os.truncate(path, path.stat().st_size - 1),
        flip_a_byte,
    ],
    ids=["empty", "start", "all-but-one-byte", "one-bit"],
)
def test_damaged_checkpoint_is_passed_over(tmp_path, damage):
    for step in (9, 10):
        path = tmp_path / f"step={step:09d}.ckpt"
        state = {"weights": torch.full((64,), 1.0).bfloat16()}
        resume.AtomicCheckpointIO().save_checkpoint(state, path)
    assert resume.newest_checkpoint(tmp_path) == path
    damage(path)
    with pytest.warns(UserWarning, match=r"step=000000010\.ckpt is truncated or corrupt"):
        assert resume.newest_checkpoint(tmp_path).name == "step=000000009.ckpt"
    os.truncate(tmp_path / "step=000000009.ckpt", 10)
    with (
        pytest.warns(UserWarning, match="truncated or corrupt"),
        pytest.raises(resume.ResumeError, match=r"nothing to resume .* 2 checkpoints, none of them whole"),
    ):
        resume.newest_checkpoint(tmp_path)


def test_resume_says_why_it_cannot(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--resume", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "nothing to resume" in capsys.readouterr().err

    demo._forget_earlier_run(demo.DemoConfig(out=str(tmp_path), size=32))
    resume.AtomicCheckpointIO().save_checkpoint({}, tmp_path / "checkpoints" / "step=000000001.ckpt")
    with pytest.raises(resume.ResumeError, match=r"size is 64, but the run in .* was started with 32"):
        demo.run(demo.DemoConfig(out=str(tmp_path)), resume=True)
    demo._forget_earlier_run(demo.DemoConfig(out=str(tmp_path)))  # a new run leaves none of the old one's
    assert not steps(tmp_path)


# ---- a loss that is not finite ----


def plant(field: str, value: float):
    def spoil(module, out, x):
        if field == "both layers":  # finite, but their distance from the image squares to infinity
            out = out._replace(foreground=out.foreground + value, background=out.background + value)
        elif field == "image":
            x.fill_(value)
        elif field == "bg_scale":
            module.model.log_bg_scale.data.fill_(value)
        elif field == "fg_scale":
            module.model.fg_scale.fill_(value)
        else:
            out = out._replace(**{field: torch.full_like(getattr(out, field), value)})
        return out

    return spoil


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "value", "term"),
    [
        ("image", NAN, "the image itself has"),
        ("kl_fg", NAN, "the KL of the foreground latents has"),
        ("kl_bg", INF, "the KL of the background latents has"),
        ("foreground", NAN, "the foreground has"),
        ("background", NAN, "the background has"),
        ("mask_logits", NAN, r"the mask \(mask_logits\) has"),
        ("fg_scale", NAN, "the foreground scale has"),
        ("bg_scale", NAN, "the background scale has"),
        ("both layers", 1e30, "the reconstruction overflows"),
    ],
)
def test_non_finite_loss_stops_and_names_the_term(tmp_path, monkeypatch, field, value, term):
    training_step = LayeredVAEModule.training_step
    spoil = plant(field, value)

    def step(self, batch, batch_idx):
        if self.global_step == 4:
            forward = self.model.forward
            monkeypatch.setattr(self.model, "forward", lambda x, **noise: spoil(self, forward(x, **noise), x))
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(LayeredVAEModule, "training_step", step)
    losses: list[float] = []
    with pytest.raises(NonFiniteLossError, match=rf"at step 4, batch 1 of epoch 1: {term}"):
        fit(tmp_path, losses)
    assert len(losses) == 4
    assert len(list(tmp_path.glob("*.ckpt"))) == 4


# ---- a user's images ----


def write(path: Path, pixels: np.ndarray) -> None:
    import skimage.io

    path.parent.mkdir(exist_ok=True)
    skimage.io.imsave(path, pixels, check_contrast=False)


def ramp(*shape: int, dtype=np.uint8) -> np.ndarray:
    values = np.linspace(0, 1, int(np.prod(shape))).reshape(shape)
    return (
        values.astype(dtype) if np.dtype(dtype).kind == "f" else (values * np.iinfo(dtype).max).astype(dtype)
    )


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("gray.png", ramp(8, 12)),
        ("gray16.png", ramp(8, 12, dtype=np.uint16)),
        ("rgb.PNG", ramp(8, 12, 3)),
        ("gray.tif", ramp(8, 12)),
        ("gray16.tiff", ramp(8, 12, dtype=np.uint16)),
        ("rgb16.tif", ramp(8, 12, 3, dtype=np.uint16)),
        ("float.tif", ramp(8, 12, dtype=np.float32)),
    ],
)
def test_images_of_every_kind_span_0_to_1(tmp_path, name, pixels):
    write(tmp_path / name, pixels)
    (tmp_path / "notes.txt").write_text("passed over")
    images = open_images(tmp_path)
    assert len(images) == 1
    expected = pixels.reshape(8, 12, -1).transpose(2, 0, 1)
    expected = expected / (np.iinfo(pixels.dtype).max if pixels.dtype.kind == "u" else 1)
    assert images[0].dtype == torch.float32
    assert images.shape == images[0].shape
    torch.testing.assert_close(images[0], torch.from_numpy(expected.astype(np.float32)))


def test_jpegs_come_in_the_order_of_their_names(tmp_path):
    write(tmp_path / "b.jpeg", np.full((16, 16, 3), 200, np.uint8))
    write(tmp_path / "a.jpg", np.full((16, 16, 3), 100, np.uint8))
    images = open_images(tmp_path)
    assert images.shape == (3, 16, 16)
    assert [round(image.mean().item() * 255) for image in images] == [100, 200]


def truncated(path: Path, pixels: np.ndarray) -> None:
    write(path, pixels)
    os.truncate(path, path.stat().st_size // 2)


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: (d / "a.png").write_bytes(b""), r"a\.png cannot be read \(UnidentifiedImageError"),
        (lambda d: (d / "a.tif").write_bytes(b"no image"), r"a\.tif cannot be read"),
        (lambda d: truncated(d / "a.png", NOISE), r"a\.png cannot be read"),
        (lambda d: truncated(d / "a.jpg", NOISE), r"a\.jpg cannot be read"),
        (lambda d: truncated(d / "a.tif", NOISE), r"a\.tif cannot be read"),
        (lambda d: write(d / "a.png", ramp(8, 8, 4)), r"a\.png has 4 channels .*, expected one, or RGB"),
        (lambda d: write(d / "a.tif", ramp(5, 9, 8)), r"a\.tif has 5 frames, expected .* one each"),
        (
            lambda d: write(d / "b.png", ramp(8, 9)),
            r"b\.png is 8 x 9 grayscale, expected 8 x 8 grayscale as a0",
        ),
        (lambda d: write(d / "b.png", ramp(8, 8, 3)), r"b\.png is 8 x 8 RGB, expected 8 x 8 grayscale as a0"),
        (
            lambda d: write(d / "a.tif", 2 * ramp(8, 8, dtype=np.float32)),
            r"values from 0 to 2, expected 0 to 1",
        ),
        (lambda d: write(d / "a.tif", np.full((8, 8), np.nan, np.float32)), "values from nan to nan"),
    ],
)
def test_bad_images_get_one_sentence(tmp_path, make, message):
    write(tmp_path / "a0.png", ramp(8, 8))
    make(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        open_images(tmp_path)
    assert "\n" not in str(error.value)


def test_bad_folders_get_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not there, expected a folder of images"):
        open_images(tmp_path / "nowhere")
    (tmp_path / "movie.mp4").write_text("")
    with pytest.raises(ValueError, match=r"holds no image, expected files that end in \.png, \.jpg"):
        open_images(tmp_path)
