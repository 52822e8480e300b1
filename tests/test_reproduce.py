"""The reproduction of the thesis: what it writes, what it does not do twice, and how it goes on."""

from __future__ import annotations

import json
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

L = pytest.importorskip("lightning")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")

from torch.utils.tensorboard import SummaryWriter  # noqa: E402

from fgbg_cuda.vae import DoubleELBOModule, LayeredVAEModule  # noqa: E402
from fgbg_cuda.vae.commands import reproduce  # noqa: E402
from fgbg_cuda.vae.evaluation import cell_metrics  # noqa: E402
from fgbg_cuda.vae.evaluation.figures import read_curves  # noqa: E402
from fgbg_cuda.vae.training import resume  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated", "ignore:.*few samples.*")

IMAGES = {"train": 100, "val": 10, "test": 40}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(cell_metrics, "BOUND_IMAGES", 4)
    monkeypatch.setattr(cell_metrics, "BOUND_SAMPLES", 2)
    monkeypatch.setattr(reproduce, "PICTURE_ROWS", 1)


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes longer than what these tests are about."""
    for name in ("curves_figure", "save_scores", "save_separation"):
        monkeypatch.setattr(reproduce, name, MagicMock())


def run(out, **options):
    defaults = {"seeds": [0], "sets": ["X50"], "models": ["LayeredVAE"], "epochs": 1, "images": IMAGES}
    return reproduce.reproduce(out, **{**defaults, **options})


def test_it_writes_every_score_config_curve_and_picture(tmp_path):
    results = run(tmp_path, models=["DoubleELBO", "LayeredVAE"])
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert [r["model"] for r in results] == ["DoubleELBO", "LayeredVAE", reproduce.ORACLE]
    for result in results[:2]:
        assert {key for key, _, _ in reproduce.COLUMNS} <= set(result)
    table = (tmp_path / "table.md").read_text()
    for result in results:
        assert f"| {result['model']} | {result['f1_open']:.3f} | {result['f1_covered']:.3f} |" in table
    assert (tmp_path / "scores.png").stat().st_size > 0
    for model, cls in (("DoubleELBO", DoubleELBOModule), ("LayeredVAE", LayeredVAEModule)):
        folder = tmp_path / model / "X50" / "seed-0"
        for picture in ("curves.png", "separation.png"):
            assert (folder / picture).read_bytes().startswith(b"\x89PNG")
        config = json.loads((folder / "config.json").read_text())
        assert config["model"]["_class_path"] == f"fgbg_cuda.vae.{cls.__name__}"
        assert config["data"]["batch_size"] == {"DoubleELBO": 5, "LayeredVAE": 25}[model]
        cls.load_from_checkpoint(folder / "model.ckpt", weights_only=True)


def test_runs_side_by_side_score_as_one_by_one(tmp_path, capsys):
    options = {"seeds": [0, 1], "epochs": 2, "models": ["LayeredVAE"]}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes have: a sum's last bits depend on it
    try:
        apart = [run(tmp_path / str(seed), **{**options, "seeds": [seed]}) for seed in (0, 1)]
    finally:
        torch.set_num_threads(threads)
    together = run(tmp_path / "together", jobs=2, **options)
    assert "4/4" in capsys.readouterr().err

    def of(result):  # without the clock's, and without what `quick` sets in this process alone
        return {key: value for key, value in result.items() if key not in ("seconds", "bound_gain")}

    assert [of(r) for r in together] == [of(r) for results in apart for r in results]
    said = r"epochs is 3, but the run in .*seed-[01] was started with 2"  # whichever is first
    with pytest.raises(resume.ResumeError, match=said):
        run(tmp_path / "together", jobs=2, **{**options, "epochs": 3})


@pytest.mark.parametrize("alive", [True, False])
def test_a_worker_ends_when_nobody_waits_for_it(monkeypatch, alive):
    epochs, ended = [0, 0], []
    monkeypatch.setattr(reproduce, "_epochs", epochs, raising=False)
    monkeypatch.setattr(
        reproduce.multiprocessing, "parent_process", lambda: SimpleNamespace(is_alive=lambda: alive)
    )
    monkeypatch.setattr(reproduce.os, "_exit", ended.append)
    reproduce.CountEpochs(1).on_train_epoch_end(SimpleNamespace(current_epoch=4), None)
    assert epochs == [0, 5]
    assert ended == ([] if alive else [1])


def test_there_must_be_a_job(tmp_path):
    with pytest.raises(ValueError, match="jobs is 0"):
        run(tmp_path, jobs=0)


def test_a_finished_run_is_not_run_again(tmp_path, monkeypatch, no_pictures):
    first = run(tmp_path)

    def refuse(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(L.Trainer, "fit", refuse)
    assert run(tmp_path) == first
    with pytest.raises(resume.ResumeError, match=r"epochs is 2, but the run in .*seed-0 was started with 1"):
        run(tmp_path, epochs=2)


def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path, monkeypatch, no_pictures):
    whole = run(tmp_path / "whole", epochs=3)[0]
    step = LayeredVAEModule.training_step

    def die(self, batch, batch_idx):
        if self.global_step == 10:  # of 12: latents have been pruned by then
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LayeredVAEModule, "training_step", die)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(tmp_path / "killed", epochs=3, checkpoint_seconds=0)
    monkeypatch.setattr(LayeredVAEModule, "training_step", step)
    folder = tmp_path / "killed" / "LayeredVAE" / "X50" / "seed-0"
    assert list((folder / "checkpoints").glob("*.ckpt"))
    assert not (folder / "result.json").exists()
    again = run(tmp_path / "killed", epochs=3, checkpoint_seconds=0)[0]
    assert {**again, "seconds": 0} == {**whole, "seconds": 0}
    curves = read_curves(folder / "tensorboard")
    assert [step for step, _ in curves["val/elbo"]] == [3, 7, 11]  # the ends of all three epochs
    models = [
        torch.load(tmp_path / name / "LayeredVAE" / "X50" / "seed-0" / "model.ckpt", weights_only=True)
        for name in ("whole", "killed")
    ]
    for a, b in zip(*(model["state_dict"].values() for model in models), strict=True):
        assert torch.equal(a, b)


def test_the_parts_of_a_run_are_in_order_whatever_their_names(tmp_path):
    """What was logged in one second: the tenth part of a process is called .10, ahead of .9."""
    for part, steps in (("9", (3, 7)), ("10", (11,))):
        writer = SummaryWriter(tmp_path / part)
        for step in steps:
            writer.add_scalar("val/elbo", float(step), step)
        writer.close()
        (file,) = (tmp_path / part).iterdir()
        (tmp_path / "all").mkdir(exist_ok=True)
        file.rename(tmp_path / "all" / f"events.out.tfevents.1700000000.host.1.{part}")
    assert read_curves(tmp_path / "all")["val/elbo"] == [(3, 3.0), (7, 7.0), (11, 11.0)]


def test_the_table_has_mean_and_standard_deviation():
    runs = [{"model": "A", "set": "X50", "seed": s, "f1_open": v} for s, v in ((1, 0.9), (2, 0.7), (3, 0.8))]
    runs += [{"model": "A", "set": "X90", "seed": 1, "f1_open": 0.25}]
    text = reproduce.table(runs)
    assert "| A | 0.800 ± 0.100 |" in text
    assert "| A | 0.250 |" in text
    assert "X50, seeds 1, 2, 3" in text


def test_unknown_names_say_what_there_is(tmp_path):
    with pytest.raises(ValueError, match="models: got 'VAE', takes some of DoubleELBO"):
        run(tmp_path, models=["VAE"])
    with pytest.raises(ValueError, match="sets: got 'X10', takes some of X90, X50, X90,20"):
        run(tmp_path, sets=["X10"])
    assert not list(tmp_path.iterdir())
