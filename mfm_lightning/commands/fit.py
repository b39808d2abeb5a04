"""`mfm fit`, `validate`, `test` and `predict`: LightningCLI with a YAML."""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import ActionYesNo, Namespace
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ProgressBar, ThroughputMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import StrategyRegistry
from torch import nn

from mfm_lightning.callbacks import EMA, ExportModel, LastCheckpoint, PlainProgress, RunRecord, StepProgressBar
from mfm_lightning.callbacks.stops import stopped_at_once
from mfm_lightning.callbacks.throughput import TrainingThroughput
from mfm_lightning.commands.data_sizes import fill_sizes, missing_sizes
from mfm_lightning.commands.errors import CommandLineError, explain
from mfm_lightning.commands.imports import import_modules
from mfm_lightning.commands.options import strict_yaml
from mfm_lightning.commands.run_folder import RunFolder
from mfm_lightning.commands.run_summary import summary
from mfm_lightning.training.fit_loop import use_fit_loop
from mfm_lightning.training.fsdp import FSDP
from mfm_lightning.training.logs import own_logs
from mfm_lightning.training.run_checkpoints import check_checkpoint
from mfm_lightning.utils.configs import DEFAULTS, find_config, read_config
from mfm_lightning.utils.console import console
from mfm_lightning.utils.distributed import is_first_rank
from mfm_rewards.execution import warn_if_bf16_is_slow

log = logging.getLogger(__name__)
CALLBACKS = {"ema": EMA, "export": ExportModel, "checkpoint": LastCheckpoint}  # of every run, by their key
KEYWORDS = ("last", "best", "hpc", "registry")  # that --ckpt_path takes in place of a path
NOISE = (  # warnings that say nothing a user could act on
    ".*does not have many workers.*",
    ".*overridden `on_before_batch_transfer`.*",
    ".*LeafSpec.*",
    ".*exists and is not empty.*",  # a folder for checkpoints; `RunFolder` says what is overwritten, and is asked first
)


class Parser(LightningArgumentParser):
    """Errors are raised, not printed with all options, and options are not abbreviated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"exit_on_error": False, "allow_abbrev": False, **kwargs})


class MFMCLI(LightningCLI):
    """LightningCLI whose runs begin with `configs/defaults.yaml`, and have the callbacks of `CALLBACKS`, a progress bar
    and loggers. Checkpoints are loaded as plain tensors only, and printing results is left to the evaluation.

    Args:
        args: the command line, the process's own where None.
        run: run the subcommand; else the objects are made alone, of a config without one.
        only: the subcommand, if it is known, so that the options of the others need not be looked up.
        typed: the command line as it was given, for the run's record, where `args` are not it.

    Raises:
        CommandLineError: for a key, a class or a value that is not known.
    """

    def __init__(
        self,
        args: Sequence[str] | None = None,
        run: bool = True,
        only: str | None = None,
        typed: Sequence[str] | None = None,
    ) -> None:
        self._only, self._begin = only, time.monotonic()
        self._typed = list(typed or args or sys.argv[1:])
        self._locked: RunFolder | None = None
        defaults = {"default_config_files": [str(DEFAULTS)]}
        super().__init__(
            model_class=L.LightningModule,
            datamodule_class=L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveConfigCallback if run else None,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            parser_class=Parser,
            parser_kwargs={name: dict(defaults) for name in self.subcommands()} if run else defaults,
            run=run,
            args=args,  # type: ignore[arg-type] # LightningCLI says list, and takes any
        )

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        if self._only is not None:
            wanted = {self._only: LightningCLI.subcommands()[self._only]}
            self.subcommands = lambda: wanted  # type: ignore[method-assign] # of this object
        super()._add_subcommands(parser, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for key, kind in CALLBACKS.items():
            parser.add_class_arguments(kind, key)
        parser.add_argument(
            "--imports",
            type=str | list[str],
            default=[],
            help="modules of yours to import; what they register has a name",
        )
        parser.add_argument(
            "--overwrite", action=ActionYesNo, default=False, help="begin anew in the folder of a finished run"
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            super().parse_arguments(parser, args)
        except argparse.ArgumentError as error:
            ours = parser if self._only is None else self._subcommand_parsers[self._only]
            keys = [action.dest for action in ours._actions]
            raise CommandLineError(explain(str(error), keys)) from error

    def _parse_ckpt_path(self) -> None:
        given = self.settings_of(self.config).get("ckpt_path")
        if given is not None and given not in KEYWORDS and "://" not in str(given):
            check_checkpoint(given, resumed=self.config.get("subcommand") == "fit")
        super()._parse_ckpt_path()

    @property
    def settings(self) -> Any:
        """What the config and the command line say, of the subcommand that is run."""
        return self.settings_of(self.config)

    def settings_of(self, config: Any) -> Any:
        """A config's part of the subcommand."""
        name = config.get("subcommand")
        return config if name is None else config[name]

    def before_instantiate_classes(self) -> None:
        settings = self.settings
        import_modules([settings.imports] if isinstance(settings.imports, str) else settings.imports)
        settings.export.overwrite = settings.export.overwrite or settings.overwrite
        if "weights_only" in settings and settings.weights_only is None:
            settings.weights_only = True
        if "return_predictions" in settings and settings.return_predictions is None:
            settings.return_predictions = False  # a command returns nothing: results are in files
        if self.subcommand == "test":
            settings.verbose = False
        for noise in NOISE:
            warnings.filterwarnings("ignore", message=noise)

    def instantiate_classes(self) -> None:
        """As LightningCLI's, but that sizes which the network's config leaves out are those of the data. jsonargparse's
        own links (`link_arguments`) would write over sizes that are given, and leave those they set out of the saved
        config."""
        config = self.config
        network = (self.settings.get("model.init_args") or {}).get("network")
        if missing_sizes(network):
            data = _instantiated("data", L.LightningDataModule, self.settings.get("data"))
            fill_sizes(network, data)
            config = config.clone()
            self.settings_of(config)["data"] = data  # what is made already is not made again
        self.config_init = self.parser.instantiate_classes(config)
        self.datamodule, self.model = self._get(self.config_init, "data"), self._get(self.config_init, "model")
        self.trainer = self.instantiate_trainer()
        on_cpu = self.trainer.strategy.root_device.type == "cpu" and self.trainer.is_global_zero
        if on_cpu and "bf16" in str(self.trainer.precision):
            warn_if_bf16_is_slow()

    def _add_instantiators(self) -> None:
        super()._add_instantiators()  # of LightningModules, which come first
        self.parser.add_instantiator(_with_config, nn.Module)

    def before_fit(self) -> None:
        given = self.config_init["fit"]
        folder = RunFolder(self.trainer.default_root_dir)
        if self.trainer.is_global_zero:  # the others are of the same run
            folder.lock.acquire()
            self._locked = folder
        # said before a config or a log is written
        if not folder.goes_on(given.get("ckpt_path")):
            for callback in (c for c in self.trainer.callbacks if isinstance(c, ExportModel)):  # type: ignore[attr-defined]
                callback.refuse_overwriting(folder.path)
        if not given.overwrite and self.trainer.is_global_zero:
            folder.refuse_overwriting(given.get("ckpt_path"))
        if given.get("ckpt_path") == "last" and folder.checkpoint.exists():
            check_checkpoint(folder.checkpoint, resumed=True)
        own_logs(self.trainer, "fit")

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
            if self.trainer.is_global_zero:
                log.info(summary(subcommand, self.trainer, time.monotonic() - self._begin, self._typed))
        finally:
            if self._locked is not None:
                self._locked.release()

    def before_validate(self) -> None:
        self._before_measuring()

    def before_test(self) -> None:
        self._before_measuring()

    def before_predict(self) -> None:
        folder = RunFolder(self.trainer.default_root_dir)
        if self.trainer.is_global_zero:  # the others wait for it before they look at what is there
            folder.lock_samples()
            self._locked = folder
            if self.config_init["predict"].overwrite:
                folder.remove_samples()
        self._before_measuring()

    def _before_measuring(self) -> None:
        self._find_weights()
        stage = str(self.subcommand)
        own_logs(self.trainer, stage)
        folder = Path(self.trainer.default_root_dir) / stage
        for callback in (c for c in self.trainer.callbacks if isinstance(c, SaveConfigCallback)):  # type: ignore[attr-defined]
            if self.trainer.is_global_zero:
                folder.mkdir(parents=True, exist_ok=True)
            callback.config_filename = str(folder.absolute() / "config.yaml")  # beside what the stage writes, not fit's

    def _find_weights(self) -> None:
        """What is measured without --ckpt_path: the run's own last checkpoint.

        Raises:
            FileNotFoundError: if there is none, and the model says nothing before it is trained.
        """
        given = self.config_init[str(self.subcommand)]
        if given.get("ckpt_path") is not None:
            return
        last = Path(self.trainer.default_root_dir) / "last.ckpt"
        if not any(p.requires_grad for p in self.model.parameters()):
            return  # nothing was trained that could be loaded
        if last.exists():
            log.info("weights: %s (--ckpt_path takes others)", last)
            given.ckpt_path = str(last)
        elif not getattr(self.model, "measures_untrained", False):
            raise FileNotFoundError(
                f"no weights to {self.subcommand}: there is no {last}; run mfm fit with this config first, or give "
                "--ckpt_path"
            )

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        settings = self.settings_of(self.config_init)
        trainer = settings.trainer
        given = trainer.callbacks or []
        given = given if isinstance(given, list) else [given]
        plain = yaml.safe_load(self._parser(self.subcommand).dump(self.settings_of(self.config), skip_none=False))
        record = RunRecord(plain, shlex.join(["mfm", *self._typed]))
        kwargs["callbacks"] = [*_missing_callbacks(settings, given), record, *given]
        if trainer.logger is None or trainer.logger is True:
            folder = trainer.default_root_dir or os.getcwd()
            kwargs["logger"] = [
                TensorBoardLogger(folder, name="logs", version="tensorboard"),
                CSVLogger(folder, name="logs", version="csv"),
            ]
        made = super().instantiate_trainer(**kwargs)
        use_fit_loop(made)
        return made


def _instantiated(name: str, kind: type, config: Any) -> Any:
    """What a parsed config of its own stands for."""
    parser = Parser()
    parser.add_argument(f"--{name}", type=kind)
    return parser.instantiate_classes(Namespace(**{name: config}))[name]


def _with_config(kind: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """Make a module; one that does not say how it was made is told, so that its file can make it again."""
    made = kind(*args, **kwargs)
    if not args and not hasattr(made, "config"):
        setattr(made, "config", kwargs)  # noqa: B010 # a Module declares tensors and modules alone
    return made


def _missing_callbacks(settings: Any, given: Sequence[Callback]) -> list[Callback]:
    """Those of every run, without what the trainer does not want; one that is given takes the place of ours."""
    ours: dict[type, Callback] = {kind: settings[key] for key, kind in CALLBACKS.items()}
    if settings.trainer.enable_checkpointing is False:
        del ours[LastCheckpoint]
    if settings.trainer.enable_progress_bar is not False:
        bar = StepProgressBar() if console().is_terminal else PlainProgress()
        ours = {ProgressBar: bar, **ours}
    if settings.trainer.logger is not False:
        ours[LearningRateMonitor] = LearningRateMonitor(logging_interval="step")
        ours[ThroughputMonitor] = TrainingThroughput()
    return [callback for kind, callback in ours.items() if not any(isinstance(other, kind) for other in given)]


def _with_found_configs(args: Sequence[str]) -> list[str]:
    """The arguments with the file of each `--config` in place of its name."""
    found, is_config = [], False
    for arg in args:
        name, equals, value = arg.partition("=")
        if is_config:
            arg = _config_file(arg)
        elif equals and name in ("--config", "-c"):
            arg = f"{name}={_config_file(value)}"
        is_config = arg in ("--config", "-c")
        found.append(arg)
    return found


def _config_file(text: str) -> str:
    if not Path(text).is_file() and re.search(r"[\s:{}\[\]]", text):  # the YAML itself
        return text
    path = find_config(text)
    read_config(path)
    return str(path)


def _quiet() -> None:
    """Leave out what Lightning says of devices that are not there, of its defaults, and of its vendor."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.trainer.connectors.checkpoint_connector"):
        logger = logging.getLogger(name)
        if _worth_saying not in logger.filters:
            logger.addFilter(_worth_saying)
    if not logging.getLogger().handlers:  # called from Python, which has not said where messages go
        return
    # each of these would say again what the root logger says
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    if not is_first_rank():  # the first one says for all what is read and found; warnings are each process's own
        for name in ("mfm_lightning", "mfm_rewards"):
            logging.getLogger(name).setLevel(logging.WARNING)


def _worth_saying(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(part in message for part in ("litlogger", "litmodels", "💡", "TPU available", "`weights_only` was"))


def run_job(name: str, args: Sequence[str], typed: Sequence[str] | None = None) -> MFMCLI | None:
    """Run `mfm fit`, `validate`, `test` or `predict` with these arguments; raises as `MFMCLI` and what it runs.

    Args:
        typed: the whole command line as it was given, where the arguments are not all of it.
    """
    if "fsdp2" not in StrategyRegistry:
        StrategyRegistry.register("fsdp2", FSDP, description="parameters, gradients and optimiser state in shards")
    args = ["--help" if arg == "--help_all" else arg for arg in args]
    strict_yaml()
    _quiet()
    # LightningCLI reads these, and warns where both are given
    sys.argv[1:] = [name, *_with_found_configs(args)]
    with stopped_at_once(f"mfm {name}"):
        return MFMCLI(only=name, typed=[name, *args] if typed is None else typed)
