"""The command line: help, configs, a run from start to end, resume, and one-sentence errors."""

from __future__ import annotations

import re
import subprocess
import sys
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
from fgbg_cuda.vae import CellNetworks, LayeredVAEModule, NonFiniteLossError, ObjectNetworks  # noqa: E402
from fgbg_cuda.vae.commands.fit import CONFIGS  # noqa: E402
from fgbg_cuda.vae.data import digits as vae_data  # noqa: E402

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
sys.modules["lightning"] = sys.modules["skimage"] = None
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
    what = 'fgbg_cuda.vae needs the extras: pip install "fgbg_cuda[demo]" (missing: lightning, skimage)'
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
    if config == "movie":
        options += [f"--data.images={movie}", "--data.crop=32", "--data.num_workers=0"]
    main(
        [
            "fit", f"--config={config}", *options, f"--out={tmp_path}/out", "--trainer.fast_dev_run=true",
            "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
        ]
    )  # fmt: skip
    assert not (tmp_path / "out" / "config.yaml").exists()


def test_configs_are_in_the_package_and_in_the_help(capsys):
    assert list(CONFIGS) == ["cells_under_disc", "digits_on_grass", "double_elbo", "movie"]
    assert all(path.is_relative_to(Path(fgbg_cuda.__file__).parent) for path in CONFIGS.values())
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    assert f"that comes with fgbg: {', '.join(CONFIGS)}" in " ".join(capsys.readouterr().out.split())


def test_a_file_of_ones_own_goes_before_a_config_of_its_name(movie, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("movie").write_text(CONFIGS["movie"].read_text().replace("width: 16", "width: 24"))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "movie", "--print_config"])
    assert stop.value.code == 0
    assert "width: 24" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "movies"])
    assert stop.value.code == 2
    assert "movies" in capsys.readouterr().err


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
    said = message(capsys, lambda: fit(movie, out, "--resume", "--model.lr=0.1"))
    assert f"model.init_args.lr is 0.1, but the run in {out} was started with 0.002" in said


def test_bad_images_and_losses_get_one_sentence(movie, tmp_path, capsys, monkeypatch):
    said = message(capsys, lambda: fit(tmp_path / "nowhere", tmp_path / "run"))
    assert "nowhere is not there, expected a folder of images or a file" in said
    assert "crop is 41" in message(capsys, lambda: fit(movie, tmp_path / "run", "--data.crop=41"))

    def fails(*arguments):
        raise NonFiniteLossError("the loss is nan at step 0")

    monkeypatch.setattr(LayeredVAEModule, "training_step", fails)
    assert "the loss is nan" in message(capsys, lambda: fit(movie, tmp_path / "other"))
