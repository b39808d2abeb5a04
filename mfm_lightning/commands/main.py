"""The command `mfm`: `fit`, `validate`, `test` and `predict` with a YAML (LightningCLI), and tools by entry points."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points

import lightning as L
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import StrategyRegistry

from mfm_lightning.modules import NonFiniteLossError
from mfm_lightning.training.fsdp import FSDP

log = logging.getLogger(__name__)
COMMANDS = "mfm_lightning.commands"


class MFMCLI(LightningCLI):
    """LightningCLI that loads checkpoints as plain tensors only and leaves printing results to the evaluation."""

    def before_instantiate_classes(self) -> None:
        settings = self.config[str(self.subcommand)]
        if settings.get("weights_only") is None:
            settings["weights_only"] = True
        if self.subcommand == "test":
            settings["verbose"] = False
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        for noise in (".*overridden `on_before_batch_transfer`.*", ".*LeafSpec.*", ".*exists and is not empty.*"):
            warnings.filterwarnings("ignore", message=noise)


def run(args: Sequence[str] | None = None) -> MFMCLI:
    """Run the command with these arguments (the process's own where None), raising what goes wrong."""
    if "fsdp2" not in StrategyRegistry:
        StrategyRegistry.register("fsdp2", FSDP, description="parameters, gradients and optimiser state in shards")
    if args is not None:
        sys.argv[1:] = args  # LightningCLI reads these, and warns where both are given
    return MFMCLI(
        model_class=L.LightningModule,
        datamodule_class=L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
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
