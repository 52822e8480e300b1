"""The command line: help, configs, a run from start to end, resume, and one-sentence errors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

L = pytest.importorskip("lightning")
pytest.importorskip("skimage")
pytest.importorskip("tensorboard")
pytest.importorskip("jsonargparse")
yaml = pytest.importorskip("yaml")

import fgbg_cuda  # noqa: E402
from fgbg_cuda.__main__ import COMMANDS, main  # noqa: E402
from fgbg_cuda.vae import (  # noqa: E402
    CellNetworks,
    InputError,
    LayeredVAE,
    LayeredVAEModule,
    NonFiniteLossError,
    ObjectNetworks,
)
from fgbg_cuda.vae.commands import demo, reproduce  # noqa: E402
from fgbg_cuda.vae.commands.fit import CONFIGS  # noqa: E402
from fgbg_cuda.vae.data import digits as vae_data  # noqa: E402
from fgbg_cuda.vae.separation.separate import load_separator  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]


@pytest.fixture(autouse=True)
def no_digits(monkeypatch):
    """The digits' file takes seconds to parse."""
    pixels = np.zeros((5000, 28, 28))
    pixels[:, 8:20, 8:20] = np.random.default_rng(0).uniform(100, 255, (5000, 1, 1))
    monkeypatch.setattr(vae_data, "_mnist_pixels", lambda: pixels.reshape(5000, 784))


@pytest.fixture
def movie(tmp_path) -> Path:
    np.save(
        tmp_path / "movie.npy", np.random.default_rng(0).integers(0, 4096, (40, 40, 40)).astype(np.uint16)
    )
    return tmp_path / "movie.npy"


def fit(movie: Path, out: Path, *options: str) -> None:
    main(
        [
            "fit", "--model=LayeredVAEModule", "--model.networks.width=8", "--data=ImagesDataModule",
            f"--data.images={movie}", "--data.crop=32", "--data.batch_size=8", "--data.intensity_range=auto",
            f"--out={out}", "--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--checkpoint_seconds=0",
            "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1",
            "--data.crops_per_image=1", *options,
        ]
    )  # fmt: skip


# ---- help ----


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text and what in text for name, what in COMMANDS.items())


WITHOUT_EXTRAS = """
import sys
for name in ("lightning", "skimage", "imagecodecs", "tqdm"):
    sys.modules[name] = None
from fgbg_cuda.__main__ import main
for arguments in (["--help"], ["fit", "--help"], ["separate", "--help"]):
    try:
        main(arguments)
    except SystemExit as stop:
        print("exit code", stop.code)
"""


def test_help_needs_no_extras_and_the_rest_says_which():
    result = subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS], capture_output=True, text=True)
    assert re.findall(r"exit code \d", result.stdout) == ["exit code 0", "exit code 1", "exit code 1"]
    assert "write the foreground, background and mask" in result.stdout
    what = 'fgbg_cuda.vae needs the extras: pip install "fgbg_cuda[train]" '
    what += "(missing: lightning, skimage, imagecodecs, tqdm)"
    assert result.stderr.splitlines() == [f"fgbg fit: {what}", f"fgbg separate: {what}"]


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"fgbg {command}" in text or f"fgbg [options] {command}" in text
    options = {
        "separate": ["--overwrite", "IMAGES"],
        "demo": ["--background", "--resume"],
        "reproduce": ["thesis", "--seeds"],
    }
    assert all(name in text for name in options.get(command, ["--trainer.precision", "--resume", "--out"]))


def test_an_unknown_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["segment"])
    assert stop.value.code == 2
    assert "invalid choice: 'segment'" in capsys.readouterr().err


# ---- configs ----


def test_other_networks_have_their_own_defaults(movie, capsys):
    """And none of the values of those they stand in for."""
    options = ["fit", "--model=LayeredVAEModule", "--data=ImagesDataModule", f"--data.images={movie}"]
    with pytest.raises(SystemExit):
        main([*options, "--model.networks=CellNetworks", "--print_config"])
    networks = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["networks"]
    assert networks["init_args"] == asdict(CellNetworks())
    with pytest.raises(SystemExit):
        main([*options, "--model.networks.width=12", "--print_config"])
    networks = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["networks"]
    assert networks["init_args"] == asdict(ObjectNetworks(width=12))


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_trains_by_its_name(config, movie, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # as who has installed the package and has no checkout
    options = ["--data.batch_size=8"]
    if config in ("objects", "crowd", "video", "calcium"):
        options += [f"--data.images={movie}"]
    if config in ("objects", "crowd"):
        options += ["--data.crop=32", "--data.num_workers=0"]
    main(
        [
            "fit", f"--config={config}", *options, f"--out={tmp_path}/out", "--trainer.fast_dev_run=true",
            "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
        ]
    )  # fmt: skip
    assert not (tmp_path / "out" / "config.yaml").exists()


def test_configs_are_in_the_package_and_in_the_help(capsys):
    known = ["calcium", "cells_under_disc", "crowd", "digits_on_grass", "double_elbo", "objects", "video"]
    assert list(CONFIGS) == known
    assert all(path.is_relative_to(Path(fgbg_cuda.__file__).parent) for path in CONFIGS.values())
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    assert f"that comes with fgbg: {', '.join(CONFIGS)}" in " ".join(capsys.readouterr().out.split())


def test_a_file_of_ones_own_goes_before_a_config_of_its_name(movie, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("objects").write_text(CONFIGS["objects"].read_text().replace("width: 16", "width: 24"))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "objects", "--print_config"])
    assert stop.value.code == 0
    assert "width: 24" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "movies"])
    assert stop.value.code == 2
    assert f"movies, which is no file and none of {', '.join(CONFIGS)}" in capsys.readouterr().err


# ---- a run from start to end ----


def test_a_run_from_images_to_their_layers(movie, tmp_path, capsys):
    out = tmp_path / "run"
    fit(movie, out, "--patience=5", "--trainer.precision=bf16-mixed")
    assert {path.name for path in out.iterdir()} >= {
        "config.yaml",
        "best.ckpt",
        "last.ckpt",
        "checkpoints",
        "pictures",
    }
    assert list(out.glob("events.out.tfevents.*"))
    names = {"separation.png", "overlay.png", "traversal.png", "curves.png"}
    assert {path.name for path in (out / "pictures").iterdir()} == names
    capsys.readouterr()

    main(["validate", f"--config={out}/config.yaml", f"--ckpt_path={out}/best.ckpt"])
    main(["test", f"--config={out}/config.yaml", f"--ckpt_path={out}/last.ckpt"])
    text = capsys.readouterr().out
    assert "val/elbo" in text
    assert "test/elbo" in text

    main(["separate", f"{out}/best.ckpt", str(movie), f"{tmp_path}/layers", "--device", "cpu"])
    mask = np.load(tmp_path / "layers" / "mask.npy")
    assert mask.shape == (40, 40, 40)
    assert mask.dtype == np.uint16


def test_true_masks_are_scored_and_can_be_learned_from(movie, tmp_path):
    masks = tmp_path / "masks.npy"
    np.save(masks, (np.load(movie) > 3000).astype(np.uint8))
    fit(
        movie,
        tmp_path / "run",
        f"--data.masks={masks}",
        "--model.supervised=true",
        "--monitor=val/iou",
        "--pictures=0",
    )
    state = torch.load(tmp_path / "run" / "best.ckpt", weights_only=True)["callbacks"]
    assert any(0 <= (known or {}).get("best_model_score", -1) <= 1 for known in state.values())


def test_early_stopping_stops(movie, tmp_path, monkeypatch):
    step = LayeredVAEModule.training_step

    def stuck(self, batch, batch_idx):
        return 0 * step(self, batch, batch_idx)  # the same score for ever

    monkeypatch.setattr(LayeredVAEModule, "training_step", stuck)
    fit(movie, tmp_path / "run", "--trainer.max_epochs=50", "--patience=2", "--pictures=0")
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["epoch"] == 2


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def test_a_run_that_broke_off_goes_on_as_if_it_had_not(movie, tmp_path, monkeypatch):
    fit(movie, tmp_path / "whole", "--pictures=0")
    step = LayeredVAEModule.training_step

    def breaks(self, batch, batch_idx):
        if self.global_step == 5:
            raise KeyError("power cut")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LayeredVAEModule, "training_step", breaks)
    with pytest.raises(KeyError, match="power cut"):
        fit(movie, tmp_path / "broken", "--pictures=0")
    monkeypatch.undo()
    main(["fit", f"--config={tmp_path}/broken/config.yaml", "--resume"])
    ours, theirs = weights(tmp_path / "broken" / "last.ckpt"), weights(tmp_path / "whole" / "last.ckpt")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert yaml.safe_load((tmp_path / "broken" / "config.yaml").read_text())["resume"] is False


# ---- errors ----


def message(capsys, call) -> str:
    """What is said of a mistake, on one line."""
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 2
    text = capsys.readouterr().err.splitlines()[-1]
    assert text.startswith("fgbg ")
    return text


def test_a_run_is_not_overwritten_nor_resumed_as_another(movie, tmp_path, capsys):
    out = tmp_path / "run"
    assert "nothing to resume" in message(capsys, lambda: fit(movie, out, "--resume"))
    fit(movie, out, "--pictures=0")
    assert "holds a run: --resume goes on with it" in message(capsys, lambda: fit(movie, out))
    said = message(capsys, lambda: fit(movie, out, "--resume", "--trainer.max_epochs=3"))
    assert f"trainer.max_epochs is 3, but the run in {out} was started with 2" in said
    said = message(capsys, lambda: fit(movie, out, "--resume", "--trainer.limit_train_batches=2"))
    assert f"trainer.limit_train_batches is 2.0, but the run in {out} was started with None" in said
    said = message(capsys, lambda: fit(movie, out, "--resume", "--model.lr=0.1"))
    assert f"model.init_args.lr is 0.1, but the run in {out} was started with 0.002" in said


def test_bad_images_and_losses_get_one_sentence(movie, tmp_path, capsys, monkeypatch):
    said = message(capsys, lambda: fit(tmp_path / "nowhere", tmp_path / "run"))
    assert "nowhere is not there, expected a folder of images or a file" in said
    assert "crop is 0" in message(capsys, lambda: fit(movie, tmp_path / "run", "--data.crop=0"))

    def fails(*arguments):
        raise NonFiniteLossError("the loss is nan at step 0")

    monkeypatch.setattr(LayeredVAEModule, "training_step", fails)
    assert "the loss is nan" in message(capsys, lambda: fit(movie, tmp_path / "other"))


def test_a_shape_that_is_not_the_images_is_refused(movie, tmp_path, capsys):
    said = message(capsys, lambda: fit(movie, tmp_path / "run", "--model.shape=[1,8,8]"))
    assert "--model.shape is [1, 8, 8], but the model is made for the images, [1, 32, 32]" in said
    fit(movie, tmp_path / "run", "--model.shape=[1,32,32]", "--trainer.max_epochs=1")


# ---- a run always ends with a model ----


def next_step(capsys) -> Path:
    """The checkpoint in the advice that a training ends with."""
    return Path(re.search(r"next: fgbg separate (\S+) IMAGES OUT", capsys.readouterr().out)[1])


@pytest.mark.parametrize(
    "option",
    ["check_val_every_n_epoch=5", "max_steps=1", "limit_val_batches=0", "overfit_batches=1"],
)
def test_there_is_a_model_whatever_is_validated(option, movie, tmp_path, capsys):
    fit(
        movie,
        tmp_path / "run",
        f"--trainer.{option}",
        "--patience=1",
        "--checkpoint_seconds=60",
        "--pictures=0",
    )
    validated = option == "overfit_batches=1"
    model = next_step(capsys)
    assert model == tmp_path / "run" / ("best.ckpt" if validated else "last.ckpt")
    load_separator(model)
    steps = {"max_steps=1": 1, "overfit_batches=1": 2}.get(option, 8)
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] == steps


def test_overfitting_sees_the_same_batches_in_every_epoch(movie, tmp_path, monkeypatch):
    seen, step = [], LayeredVAEModule.training_step

    def record(self, batch, batch_idx):
        seen.append(batch.image)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LayeredVAEModule, "training_step", record)
    fit(movie, tmp_path / "run", "--trainer.overfit_batches=2", "--pictures=0")
    assert [len(images) for images in seen] == [8] * 4
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])


def test_training_nothing_is_no_success(movie, tmp_path, capsys):
    said = message(capsys, lambda: fit(movie, tmp_path / "run", "--trainer.max_epochs=0"))
    assert "not a step was trained: max_epochs is 0" in said


def test_a_path_with_a_blank_is_quoted(movie, tmp_path, capsys):
    fit(movie, tmp_path / "a run", "--trainer.max_steps=1", "--pictures=0")
    assert f"next: fgbg separate '{tmp_path}/a run/last.ckpt' IMAGES OUT" in capsys.readouterr().out


def test_a_start_that_failed_blocks_nothing(movie, tmp_path, capsys, monkeypatch):
    def fails(*arguments):
        raise InputError("no such luck")

    monkeypatch.setattr(LayeredVAEModule, "training_step", fails)
    assert "no such luck" in message(capsys, lambda: fit(movie, tmp_path / "run"))
    monkeypatch.undo()
    fit(movie, tmp_path / "run", "--model.lr=0.001", "--pictures=0")
    assert next_step(capsys).exists()
    assert len(list((tmp_path / "run").glob("events.out.tfevents.*"))) == 1
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["model"]["init_args"]["lr"] == 0.001


def test_a_run_too_short_for_a_checkpoint_to_resume_from_resumes(movie, tmp_path, capsys):
    """Whoever starts it again is told that --resume goes on with it."""
    out = tmp_path / "run"
    options = ("--checkpoint_seconds=60", "--pictures=0")
    fit(movie, out, *options)
    assert not (out / "checkpoints").exists()
    assert "holds a run: --resume goes on with it" in message(capsys, lambda: fit(movie, out, *options))
    before = weights(out / "last.ckpt")
    fit(movie, out, *options, "--resume")
    assert all(torch.equal(value, before[name]) for name, value in weights(out / "last.ckpt").items())
    assert next_step(capsys) == out / "best.ckpt"


# ---- where things are ----


def test_a_tilde_is_the_home_folder(movie, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("out: ~/run\nmodel: {init_args: {lr: 0.003}}\n")
    fit(
        Path("~/movie.npy"), Path("~/other"), "--config=~/mine.yaml", "--trainer.max_epochs=1", "--pictures=0"
    )
    assert next_step(capsys) == tmp_path / "run" / "best.ckpt"
    main(["validate", "--config=~/run/config.yaml", "--ckpt_path=~/run/last.ckpt"])
    assert "val/elbo" in capsys.readouterr().out
    main(["separate", "~/run/best.ckpt", "~/movie.npy", "~/layers", "--device=cpu"])
    assert (tmp_path / "layers" / "mask.npy").exists()
    outs = []
    monkeypatch.setattr(demo, "run", lambda config, resume: outs.append(config.out) or sys.exit())
    monkeypatch.setattr(
        reproduce, "reproduce", lambda out, *arguments, **options: outs.append(out) or sys.exit()
    )
    for command in ("demo", "reproduce"):
        with pytest.raises(SystemExit):
            main([command, "--out=~/there"])
    assert outs == [str(tmp_path / "there")] * 2
    assert not Path("~").exists()


def test_the_backend_of_a_notebook_does_not_matter():
    command = [sys.executable, "-m", "fgbg_cuda", "separate", "--help"]
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline_that_is_not_installed"}
    subprocess.run(command, env=environment, capture_output=True, check=True)


def test_the_logger_is_the_one_that_was_asked_for(movie, tmp_path):
    fit(movie, tmp_path / "none", "--trainer.logger=false", "--trainer.max_epochs=1", "--pictures=0")
    fit(
        movie,
        tmp_path / "csv",
        "--trainer.logger=CSVLogger",
        f"--trainer.logger.save_dir={tmp_path}/logs",
        "--pictures=0",
        "--trainer.max_epochs=1",
    )
    for out in (tmp_path / "none", tmp_path / "csv"):
        assert (out / "config.yaml").exists()
        assert not list(out.glob("events.out.tfevents.*"))
    assert "val/elbo" in next((tmp_path / "logs").rglob("metrics.csv")).read_text()


def test_scores_are_those_of_a_trained_model(movie, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    data = [f"--out={out}", "--model=LayeredVAEModule", "--data=ImagesDataModule", f"--data.images={movie}"]
    for command in ("validate", "test"):
        said = message(capsys, lambda command=command: main([command, *data]))
        assert f"{out} holds no trained model to {command}, and there is no --ckpt_path" in said
    fit(movie, out, "--pictures=0")
    scored, step = [], LayeredVAEModule.validation_step

    def record(self, batch, batch_idx):
        scored.append(self.state_dict())
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LayeredVAEModule, "validation_step", record)
    main(["validate", f"--config={out}/config.yaml"])
    best = weights(out / "best.ckpt")
    assert all(torch.equal(value, best[name]) for name, value in scored[0].items())


# ---- training of unknown length, and in half precision ----


@pytest.mark.filterwarnings("ignore:the number of steps is not known")
def test_a_training_that_only_time_ends(movie, tmp_path, capsys):
    fit(movie, tmp_path / "run", "--trainer.max_epochs=-1", "--trainer.max_time=00:00:00:01", "--pictures=0")
    load_separator(next_step(capsys))
    trained = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert trained["global_step"] > 0
    assert not trained["lr_schedulers"]
    assert trained["optimizer_states"][0]["param_groups"][0]["lr"] == LayeredVAEModule().hparams.lr


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        while True:
            yield torch.rand(1, 32, 32, generator=generator)


@pytest.mark.parametrize("limit", [{"max_steps": 3}, {"max_time": {"seconds": 1}}])
def test_images_without_an_end(limit):
    module = LayeredVAEModule(networks=ObjectNetworks(width=8))
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **limit,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(Endless(), batch_size=4)
    known = "max_steps" in limit
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader)
    assert any("number of steps is not known" in str(warning.message) for warning in caught) != known
    assert bool(trainer.lr_scheduler_configs) == known
    assert trainer.global_step == 3 if known else trainer.global_step > 0


@pytest.mark.parametrize("composition", ["mixture", "blended"])
def test_an_additive_foreground_in_half_precision(composition, movie, tmp_path, capsys):
    options = ("--model.additive=true", f"--model.composition={composition}", "--pictures=0")
    fit(movie, tmp_path / "run", *options, "--trainer.precision=bf16-true", "--trainer.max_epochs=1")
    model = next_step(capsys)
    for precision in ("bf16-true", "16-true"):
        main(["validate", f"--config={tmp_path}/run/config.yaml", f"--trainer.precision={precision}"])
        assert "nan" not in capsys.readouterr().out
    module, _, _ = load_separator(model)
    x = torch.rand(2, 1, 32, 32)
    whole, half = module.float().separate(x), module.bfloat16().separate(x.bfloat16())
    for ours, theirs in zip(half, whole, strict=True):
        # Values of about 1, of 8 bits, through a dozen layers.
        torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=0.1)
    said = message(capsys, lambda: fit(movie, tmp_path / "half", *options, "--trainer.precision=16-true"))
    assert "trainer.precision is 16-true" in said


# ---- images of one's own loader ----


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (
            [{"image": torch.rand(4, 1, 32, 32)}],
            "a batch has images of type dict, expected a tensor of floats",
        ),
        ([torch.rand(4, 32, 32)], r"images of type torch.float32 \[4, 32, 32\], expected"),
        ([torch.zeros(4, 1, 32, 32, dtype=torch.uint8)], r"images of type torch.uint8 \[4, 1, 32, 32\]"),
        ([255 * torch.rand(4, 1, 32, 32)], r"the images have values from .* to 25\d.*, expected 0 to 1"),
        ([()], "images of type list"),
    ],
)
def test_batches_that_are_no_images(batches, message):
    module = LayeredVAEModule(networks=ObjectNetworks(width=8))
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    with pytest.raises(InputError, match=message):
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))


# ---- masks that say nothing ----


@pytest.mark.parametrize(("share", "said"), [(0.0005, "cover 0.05%"), (0.95, "cover 95.00%"), (0.1, None)])
def test_masks_that_cover_nothing_or_everything_are_warned_of(share, said, movie, tmp_path, monkeypatch):
    separate = LayeredVAE.separate

    def covering(self, x):
        found = separate(self, x)
        return found._replace(mask=torch.full_like(found.mask, share))

    monkeypatch.setattr(LayeredVAE, "separate", covering)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(movie, tmp_path / "run", "--trainer.max_steps=4", "--trainer.max_epochs=1", "--pictures=0")
        main(["separate", f"{tmp_path}/run/best.ckpt", str(movie), f"{tmp_path}/layers", "--device=cpu"])
    warned = [str(warning.message) for warning in caught if "the masks cover" in str(warning.message)]
    assert len(warned) == (0 if said is None else 2)
    assert all(said in text for text in warned)
    assert not warned or ("of the validation images" in warned[0] and str(movie) in warned[1])


def test_debug_shows_where(movie, tmp_path):
    with pytest.raises(ValueError, match=r"lr is 0\.0, expected a positive number"):
        fit(movie, tmp_path / "run", "--model.lr=0", "--debug")
