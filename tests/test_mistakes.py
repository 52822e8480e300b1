"""A mistake on the command line is one sentence and exit code 2, in whichever option of whichever command."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("lightning")
pytest.importorskip("skimage")
pytest.importorskip("tensorboard")
jsonargparse = pytest.importorskip("jsonargparse")

import fgbg_cuda.vae  # noqa: E402
from fgbg_cuda.__main__ import main  # noqa: E402
from fgbg_cuda.vae.commands import demo, fit, reproduce, separate  # noqa: E402
from fgbg_cuda.vae.commands.fit import FgbgCLI  # noqa: E402
from fgbg_cuda.vae.data import digits  # noqa: E402

# Options for which any text will do, or will do until the training has begun.
TEXT = {
    "out",
    "monitor",
    "ckpt_path",
    "images",
    "checkpoint",
    "trainer.default_root_dir",
    "trainer.model_registry",
}
# Options of Lightning that take a negative number as none.
NEGATIVE = {
    f"trainer.{name}" for name in ("min_epochs", "min_steps", "num_sanity_val_steps", "log_every_n_steps")
}
NEGATIVE |= {"trainer.gradient_clip_val", "max_minutes", "seeds", "epochs", "jobs"}


class AcceptedError(Exception):
    """The options passed all checks: what comes next is the training."""


class FoundError(Exception):
    """Carries a parser out of the command that made it."""


def accept(*arguments, **options):
    raise AcceptedError


@pytest.fixture
def nothing_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    np.save("movie.npy", np.random.default_rng(0).integers(0, 4096, (9, 16, 16)).astype(np.uint16))
    for name in ("fit", "validate", "test"):
        monkeypatch.setattr(FgbgCLI, name, accept)
    monkeypatch.setattr(digits, "_mnist_pixels", lambda: np.zeros((5000, 784)))  # parsing takes seconds
    monkeypatch.setattr(demo, "run", accept)
    monkeypatch.setattr(reproduce, "reproduce", accept)
    monkeypatch.setattr(separate, "run", accept)


@pytest.fixture(autouse=True)
def one_parser(monkeypatch):
    """Making the parsers takes longer than using them."""
    made, set_up = {}, FgbgCLI.setup_parser

    def setup_parser(self, *arguments):
        if not made:
            set_up(self, *arguments)
            made.update(vars(self))
        vars(self).update({name: made[name] for name in made.keys() - vars(self).keys()})

    monkeypatch.setattr(FgbgCLI, "setup_parser", setup_parser)


def parser_of(command: str) -> argparse.ArgumentParser:
    def found(self, *arguments):
        raise FoundError(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FgbgCLI, "parse_arguments", found)
        patch.setattr(argparse.ArgumentParser, "parse_args", found)
        run = {"separate": separate, "demo": demo, "reproduce": reproduce}.get(command, fit)
        with pytest.raises(FoundError) as caught:
            run.main([command])
    found = caught.value.args[0]
    return found if isinstance(found, argparse.ArgumentParser) else found._subcommand_parsers[command]


def options_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Those that take a value."""
    for action in parser._actions:
        if (
            action.option_strings
            and action.nargs != 0
            and not action.dest.endswith((".help", "print_config"))
        ):
            yield action


def class_options(name: str, prefix: str) -> list[str]:
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(getattr(fgbg_cuda.vae, name), fail_untyped=False)
    return [f"{prefix}.{action.dest}" for action in options_of(parser) if action.dest != "shape"]


def outcome(capsys, *arguments: str) -> str:
    """What is said of them, "" if they are accepted."""
    with pytest.raises((AcceptedError, SystemExit)) as stop:
        main([*arguments])
    said = capsys.readouterr().err
    if stop.type is AcceptedError:
        return ""
    assert stop.value.code == 2, arguments
    return said


BASE = [
    "--model=LayeredVAEModule",
    "--data=ImagesDataModule",
    "--data.images=movie.npy",
    "--data.batch_size=2",
]
FEW = ["--data.train=9", "--data.val=1", "--data.test=1"]
CLASSES = {  # what comes before an option of theirs
    "LayeredVAEModule": ("model", BASE),
    "DoubleELBOModule": ("model", ["--model=DoubleELBOModule", *BASE[1:]]),
    "ObjectNetworks": ("model.networks", [*BASE, "--model.networks=ObjectNetworks"]),
    "CellNetworks": ("model.networks", [*BASE, "--model.networks=CellNetworks"]),
    "ImagesDataModule": ("data", BASE),
    "DigitsOnTexture": ("data", [BASE[0], "--data=DigitsOnTexture", *FEW]),
    "CellsUnderDisc": ("data", [BASE[0], "--data=CellsUnderDisc", *FEW]),
}


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("command", ["fit", "validate", "test", *CLASSES])
def test_every_option_with_a_wrong_value(command, capsys):
    if command in CLASSES:
        prefix, before = CLASSES[command]
        names, arguments = class_options(command, prefix), ["fit", *before]
    else:
        names, arguments = [action.dest for action in options_of(parser_of(command))], [command, *BASE]
        arguments += ["--ckpt_path=some.ckpt"] if command != "fit" else []
        assert len(names) > 40
    # The base is accepted: what is refused is the option. (That the images are no 60 x 60 ones comes last.)
    assert outcome(capsys, *arguments) == "" or command == "DoubleELBOModule"
    for name in names:
        # Numbers of validate and test are checked as those of fit.
        for value in ("nonsense", "-7") if command not in ("validate", "test") else ("nonsense",):
            said = outcome(capsys, *arguments, f"--{name}={value}")
            free = name in TEXT | NEGATIVE if value == "-7" else name in TEXT
            assert free or said.splitlines()[-1].startswith("fgbg "), f"--{name}={value} is accepted"
            assert said.count("\n") <= 1, said


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("command", ["separate", "demo", "reproduce"])
def test_every_option_of_the_other_commands_with_a_wrong_value(command, capsys):
    arguments = ["a.ckpt", "movie.npy", "layers"] if command == "separate" else []
    assert outcome(capsys, command, *arguments) == ""
    options = list(options_of(parser_of(command)))
    assert len(options) > 4
    for action in options:
        name = action.option_strings[0]
        values = ["nonsense"] * (action.nargs if isinstance(action.nargs, int) else 1)
        said = outcome(capsys, command, *arguments, name, *values)
        assert f"fgbg {command}: error: argument {name}" in said or action.dest in ("out", "device")
