"""The command `mfm`: `fit`, `validate`, `test` and `predict` with a YAML (LightningCLI), and tools by entry points."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import StrategyRegistry

from mfm_lightning.callbacks import EMA, ExportModel, LastCheckpoint, StepProgressBar
from mfm_lightning.modules import NonFiniteLossError
from mfm_lightning.training.fsdp import FSDP
from mfm_lightning.utils.configs import DEFAULTS, find_config

log = logging.getLogger(__name__)
COMMANDS = "mfm_lightning.commands"
CALLBACKS = {"ema": EMA, "export": ExportModel, "checkpoint": LastCheckpoint}  # of every run, by their key


class MFMCLI(LightningCLI):
    """LightningCLI whose runs begin with `configs/defaults.yaml`, and have the callbacks of `CALLBACKS`, a progress bar
    and loggers. Checkpoints are loaded as plain tensors only, and printing results is left to the evaluation."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for key, kind in CALLBACKS.items():
            parser.add_class_arguments(kind, key)

    def before_instantiate_classes(self) -> None:
        settings = self.config[str(self.subcommand)]
        if settings.get("weights_only") is None:
            settings["weights_only"] = True
        if self.subcommand == "test":
            settings["verbose"] = False
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        for noise in (".*overridden `on_before_batch_transfer`.*", ".*LeafSpec.*", ".*exists and is not empty.*"):
            warnings.filterwarnings("ignore", message=noise)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        settings = self.config_init[str(self.subcommand)]
        trainer = settings.trainer
        given = trainer.callbacks or []
        given = given if isinstance(given, list) else [given]
        kwargs["callbacks"] = [*_missing_callbacks(settings, given), *given]
        if trainer.logger is None or trainer.logger is True:
            folder = trainer.default_root_dir or os.getcwd()
            kwargs["logger"] = [
                TensorBoardLogger(folder, name="logs", version="tensorboard"),
                CSVLogger(folder, name="logs", version="csv"),
            ]
        return super().instantiate_trainer(**kwargs)


def _missing_callbacks(settings: Any, given: Sequence[Callback]) -> list[Callback]:
    """Those of every run, without what the trainer does not want; one that is given takes the place of ours."""
    ours = {kind: settings[key] for key, kind in CALLBACKS.items()}
    if settings.trainer.enable_checkpointing is False:
        del ours[LastCheckpoint]
    if settings.trainer.enable_progress_bar is not False:
        ours = {ProgressBar: StepProgressBar(), **ours}
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
    # else it is the YAML itself
    return str(find_config(text)) if text.endswith((".yaml", ".yml", ".json")) else text


def run(args: Sequence[str] | None = None) -> MFMCLI:
    """Run the command with these arguments (the process's own where None), raising what goes wrong."""
    if "fsdp2" not in StrategyRegistry:
        StrategyRegistry.register("fsdp2", FSDP, description="parameters, gradients and optimiser state in shards")
    # LightningCLI reads these, and warns where both are given
    sys.argv[1:] = _with_found_configs(sys.argv[1:] if args is None else args)
    return MFMCLI(
        model_class=L.LightningModule,
        datamodule_class=L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        parser_kwargs={name: {"default_config_files": [str(DEFAULTS)]} for name in MFMCLI.subcommands()},
    )


def commands() -> dict[str, EntryPoint]:
    """The commands besides LightningCLI's, by name, to be loaded and called with their arguments; packages add theirs
    by the entry-point group of `COMMANDS`."""
    return {point.name: point for point in entry_points(group=COMMANDS)}


def main(args: Sequence[str] | None = None) -> None:
    """Entry point: errors that the user can mend end with their message and status 1, without a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "litlogger" not in r.getMessage())
    args = list(sys.argv[1:] if args is None else args)
    if "" not in sys.path:
        sys.path.append("")  # rewards and methods of a user's own, in the folder that the command runs in
    try:
        tools = commands()
        if args[:1] and args[0] in tools:
            tools[args[0]].load()(args[1:])
        else:
            run(args)
    except (FileNotFoundError, FloatingPointError, ImportError, NonFiniteLossError, ValueError) as error:
        if log.isEnabledFor(logging.DEBUG):
            raise
        sys.exit(f"mfm: {type(error).__name__}: {_reason(error)}")


def _reason(error: Exception) -> str:
    """The message; of jsonargparse's, which repeat the whole config, the part that says what was wrong."""
    found = re.search(r"\nErrors:\n(.*?)\nGiven value type:", str(error), re.DOTALL)
    if found is None:
        return str(error)
    reasons = [reason for reason in re.split(r"^\s*- ", found[1], flags=re.MULTILINE) if reason.strip()]
    return "; ".join(r.strip() for r in reasons if r.strip() != "Expected a <class 'NoneType'>") or str(error)


if __name__ == "__main__":
    main()
