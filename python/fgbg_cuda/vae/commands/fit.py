"""``fgbg fit``, ``fgbg validate`` and ``fgbg test``, by Lightning's command line."""

from __future__ import annotations

import inspect
import os
import shlex
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import ActionConfigFile, ActionYesNo
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from ..errors import InputError, ResumeError, at_least, positive, whole
from ..evaluation.metrics import warn_of_mask
from ..training.modules import images_of
from ..training.pictures import Pictures
from ..training.resume import check_settings, newest_checkpoint, read_checkpoint
from ..training.trainer import DEFAULTS, make_trainer, quiet

CONFIGS = {path.stem: path for path in sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))}

# What a resumed run may not change: its schedules were laid out for these.
DECISIVE = ("seed_everything", "model", "data", "trainer")
# Of the trainer's options, those that say how many steps there are.
STEPS = ("max_epochs", "max_steps", "limit_train_batches", "overfit_batches", "accumulate_grad_batches")


class ConfigFile(ActionConfigFile):
    """A configuration file, or the name of one that comes with the package (a file goes before a name)."""

    def __call__(self, parser: Any, namespace: Any, value: str, option_string: str | None = None) -> None:
        if value in CONFIGS and not Path(value).is_file():
            value = str(CONFIGS[value])
        elif value.isidentifier() and not Path(value).exists():
            raise InputError(f"--config is {value}, which is no file and none of {', '.join(CONFIGS)}")
        super().__call__(parser, namespace, value, option_string)


class SaveConfig(SaveConfigCallback):
    """Saves the settings of a run into its folder, wherever its logger writes."""

    def save_config(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        out = Path(self.config.out)
        out.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, out / "config.yaml", skip_none=False, overwrite=True, multifile=False)


def model_of(out: str | Path) -> Path | None:
    """The best model of the run in ``out``, else its last."""
    return next((path for name in ("best", "last") if (path := Path(out) / f"{name}.ckpt").is_file()), None)


def shape_of(data: L.LightningDataModule) -> tuple[int, int, int]:
    """(C, H, W) of the images to train on, for which the model is made."""
    data.prepare_data()
    data.setup("fit")
    if hasattr(data, "describe"):
        return data.describe()["shape"]
    with torch.random.fork_rng():  # the loader draws numbers, and training is to begin with the same ones
        return tuple(images_of(next(iter(data.train_dataloader()))).shape[1:])


class FgbgCLI(LightningCLI):
    """Everything of a run goes into the folder ``--out``, from which ``--resume`` can go on."""

    def init_parser(self, **options: Any) -> LightningArgumentParser:
        parser = self.parser_class(**options)
        parser.add_argument(
            "-c",
            "--config",
            action=ConfigFile,
            help=f"a YAML file, or the name of one that comes with fgbg: {', '.join(CONFIGS)}",
        )
        return parser

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        skipped = LightningCLI.subcommands()
        return {name: {*skipped[name], "weights_only"} for name in ("fit", "validate", "test")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data", "model.init_args.shape", compute_fn=shape_of, apply_on="instantiate")
        parser.add_argument("--out", default="runs/fit", help="folder for the results of fit")
        parser.add_argument(
            "--resume",
            action=ActionYesNo,
            default=False,
            help="go on with the run in OUT from where it was stopped; give its OUT/config.yaml as --config",
        )
        parser.add_argument("--monitor", default="val/elbo", help="the score that tells the best model")
        parser.add_argument(
            "--monitor_mode",
            choices=("max", "min"),
            default="max",
            help="whether more is better or less",
        )
        parser.add_argument(
            "--patience",
            type=int | None,
            default=None,
            help="stop when MONITOR has not improved for so many validations (default: train to the end)",
        )
        parser.add_argument(
            "--checkpoint_seconds", type=float, default=60.0, help="the most that a kill can cost"
        )
        parser.add_argument(
            "--pictures",
            type=int,
            default=10,
            help="draw pictures every so many epochs and at the end (0: never)",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        command = self.config.subcommand
        config = self.config[command]
        at_least(0, checkpoint_seconds=config.checkpoint_seconds)
        whole(0, pictures=config.pictures, patience=config.patience or 0)
        for name in ("accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval"):
            if isinstance(config.trainer[name], (int, float)):  # Lightning divides by it without a look
                positive(**{f"trainer.{name}": config.trainer[name]})
        config.out = os.path.expanduser(config.out)
        if config.ckpt_path is not None:
            config.ckpt_path = os.path.expanduser(config.ckpt_path)
            if os.path.exists(config.ckpt_path):
                read_checkpoint(config.ckpt_path, "state_dict")
        elif command != "fit":
            config.ckpt_path = model_of(config.out)
            if config.ckpt_path is None:
                raise InputError(
                    f"{config.out} holds no trained model to {command}, and there is no --ckpt_path"
                )

    def before_instantiate_classes(self) -> None:
        self.save_config_callback = None  # it would save to where the logger does
        if self.subcommand != "fit":
            return
        config = self.config.fit
        out = Path(config.out)
        saved = out / "config.yaml"
        if config.resume:
            self.checkpoint = newest_checkpoint(out / "checkpoints", out / "last.ckpt")
            self._check_same_run(saved)
        elif not config.trainer.fast_dev_run and saved.exists():
            if model_of(out) or any((out / "checkpoints").glob("*.ckpt")):
                raise ResumeError(
                    f"{out} holds a run: --resume goes on with it, another --out starts a new one"
                )
            for log in (*out.glob("events.out.tfevents.*"), out / "hparams.yaml"):  # of a start that failed
                log.unlink(missing_ok=True)

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        given = (self.config[self.subcommand].model.get("init_args") or {}).get("shape")
        network = getattr(self.model, "model", self.model)
        default = inspect.signature(type(network).__init__).parameters.get("shape")
        actual = self.model.hparams.get("shape")
        if None in (given, default, actual) or tuple(given) in (default.default, tuple(actual)):
            return
        raise InputError(
            f"--model.shape is {list(given)}, but the model is made for the images, {list(actual)}: "
            "leave it out"
        )

    def _check_same_run(self, saved: Path) -> None:
        before = yaml.safe_load(saved.read_text())
        now = yaml.safe_load(self.parser.dump(self.config, skip_none=False))["fit"]
        now["trainer"] = {name: now["trainer"][name] for name in STEPS}
        check_settings({name: now[name] for name in DECISIVE}, before, saved.parent)

    def fit(self, **options: Any) -> None:
        if self.config.fit.resume:
            options["ckpt_path"] = self.checkpoint
        self.trainer.fit(**options, weights_only=True)

    def after_fit(self) -> None:
        config, trainer = self.config.fit, self.trainer
        if config.trainer.fast_dev_run or not trainer.is_global_zero:
            return
        if trainer.global_step == 0:
            raise InputError(
                f"not a step was trained: max_epochs is {trainer.max_epochs}, max_steps {trainer.max_steps}, "
                f"limit_train_batches {trainer.limit_train_batches}"
            )
        warn_of_mask(trainer.callback_metrics.get("val/mask"), "the validation images")
        model = model_of(config.out)
        kept = (
            "" if model.name == "best.ckpt" else f" (no best.ckpt, as {config.monitor} was never validated)"
        )
        print(f"see {config.out}/{kept}; next: fgbg separate {shlex.quote(str(model))} IMAGES OUT")

    def validate(self, **options: Any) -> None:
        self.trainer.validate(**options, weights_only=True)

    def test(self, **options: Any) -> None:
        self.trainer.test(**options, weights_only=True)

    def instantiate_trainer(self) -> L.Trainer:
        config = self.config_init[self.subcommand]
        options = dict(config.trainer)
        if self.subcommand != "fit":
            options |= {"logger": options["logger"] or False, "enable_checkpointing": False}
            return L.Trainer(**options)
        if options["logger"] in (None, True):
            options["logger"] = TensorBoardLogger(config.out, name="", version="")
        callbacks, plugins = (_list(options.pop(name)) for name in ("callbacks", "plugins"))
        callbacks += self._callbacks(config)
        if not (config.resume or options["fast_dev_run"]):
            callbacks.append(SaveConfig(self._parser("fit"), self.config.fit, save_to_log_dir=False))
        return make_trainer(
            Path(config.out),
            "last.ckpt",
            config.checkpoint_seconds,
            callbacks=callbacks,
            plugins=plugins,
            **options,
        )

    @staticmethod
    def _callbacks(config: Any) -> list[Callback]:
        best = {"monitor": config.monitor, "mode": config.monitor_mode}
        callbacks = [ModelCheckpoint(config.out, filename="best", enable_version_counter=False, **best)]
        if config.pictures:
            callbacks.append(Pictures(Path(config.out) / "pictures", config.pictures))
        if config.patience is not None:
            callbacks.append(EarlyStopping(patience=config.patience, strict=False, **best))
        return callbacks


def _list(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [] if given is None else [given]


def main(argv: list[str] | None = None) -> None:
    quiet()
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")  # for validate
    FgbgCLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        trainer_defaults=DEFAULTS,
        auto_configure_optimizers=False,  # each module has its own
        parser_kwargs={
            "prog": "fgbg",
            "description": "Trains and scores models that separate images.",
            "exit_on_error": False,  # what it says is said in one sentence
            **{command: {"exit_on_error": False} for command in FgbgCLI.subcommands()},
        },
        args=argv,
    )
