"""The plan of a config that trains an adapter on a text-to-image flow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from mfm_lightning.alignment.posteriors import Posterior
from mfm_lightning.commands.adapter_planning import AdapterPlan, plan_finetuning, plan_pretraining
from mfm_lightning.commands.flow_plan import part_of
from mfm_lightning.objectives import Objective
from mfm_lightning.utils.console import console

FINETUNING = "mfm_lightning.modules.PromptFinetuning"
ADAPTER = "mfm_lightning.backbones.FlowAdapter"


def trains_adapter(config: dict[str, Any]) -> bool:
    """Whether a config does."""
    model = config.get("model") or {}
    network = (model.get("init_args") or {}).get("network") or {}
    return model.get("class_path") == FINETUNING or network.get("class_path") == ADAPTER


def plan_adapter(path: Path, config: dict[str, Any], batch_size: int | None = None, **changed: Any) -> AdapterPlan:
    """Plan the job of a config.

    Args:
        path: of the config, for messages.
        config: what it holds.
        batch_size: in place of the config's.
        changed: `image_size`, `max_rows` and `torch_dtype` in place of the config's; None leaves it.

    Raises:
        FileNotFoundError, ImportError, ValueError: as `plan_flow`; ValueError also for settings that do not fit.
    """
    arguments, data = config["model"].get("init_args") or {}, config.get("data") or {}
    while isinstance(inner := (data.get("init_args") or {}).get("data"), dict):  # of OffPolicyDataModule
        data = inner
    samples = batch_size or (data.get("init_args") or {}).get("batch_size")
    if samples is None:
        raise ValueError(f"{path}: the data have no batch_size: give --batch_size")
    changed = {name: value for name, value in changed.items() if value is not None}
    if config["model"]["class_path"] != FINETUNING:
        network = {**(arguments["network"].get("init_args") or {}), **changed}
        made = part_of(path, "objective", Objective, arguments.get("objective") or {})
        return plan_pretraining(_named(path, network), made, int(samples))
    flow = {**((arguments.get("flow") or {}).get("init_args") or {}), **changed}
    posterior = arguments.get("posterior")
    return plan_finetuning(
        _named(path, flow),
        {name: arguments[name] for name in ("rank", "alpha", "ranks", "targets") if arguments.get(name) is not None},
        arguments.get("mfm") is not None,
        None if posterior is None else part_of(path, "posterior", Posterior, posterior),
        arguments.get("gradient", "reward"),
        int(arguments.get("num_draws", 1)),
        arguments.get("guidance"),
        int(samples),
    )


def show(plan: AdapterPlan, memory: float) -> None:
    """Print a plan."""
    terminal = console()
    height, width = plan.image_size
    terminal.print(
        f"{plan.trained / 1e6:,.2f} M trained parameters; images of {height} x {width}, {plan.batch_size} at once"
    )
    terminal.print(f"sizes: {plan.source}", markup=False)
    table, parts = Table("what", "GB at most"), plan.memory()
    for name, size in parts.items():
        table.add_row(name, f"{size / 1e9:,.2f}")
    total = sum(parts.values()) / 1e9
    table.add_row("sum", f"{total:,.2f} of {memory:g}{'' if total < memory else '  (too much)'}", style="bold")
    terminal.print(table)
    terminal.print(
        "On each device under DDP; fsdp2 also cuts what is frozen or trained in parts. Not counted: rewards, text "
        "encoders, CUDA's context and NCCL's buffers (about 1 GB), what the allocator wastes. Less memory: "
        "checkpointing, tiled, a smaller batch_size with accumulation, or image_size."
    )


def _named(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    if "name" not in settings:
        raise ValueError(f"{path}: the flow has no name")
    return settings
