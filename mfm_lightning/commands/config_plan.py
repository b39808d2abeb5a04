"""The plan of a config: its network, objective and execution, on tensors without content."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from rich.table import Table
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mfm_lightning.commands.data_report import data_of_config
from mfm_lightning.commands.data_sizes import fill_sizes, missing_sizes
from mfm_lightning.commands.errors import explain
from mfm_lightning.commands.planning import Plan, plan_training
from mfm_lightning.modules import TrainingExecution
from mfm_lightning.objectives import Objective
from mfm_lightning.utils.configs import default_settings, find_config, read_config
from mfm_lightning.utils.console import console

MODULE = "mfm_lightning.modules.MFMPretraining"


def plan_config(
    path: Path,
    devices: int | None = None,
    batch_size: int | None = None,
    reference: bool = False,
    memory: float | None = None,
) -> Plan:
    """Plan the job of a config.

    Args:
        devices: instead of the config's.
        batch_size: instead of the config's.
        reference: count the memory of the straightforward step, too.
        memory: bytes of a device, for which the largest batch is looked for.

    Raises:
        FileNotFoundError: if there is no such config.
        ValueError: if it is not one of `MFMPretraining`, or a setting is unknown.
    """
    path = find_config(path)
    config = read_config(path)
    model, trainer = config.get("model") or {}, default_settings()["trainer"] | (config.get("trainer") or {})
    if model.get("class_path") != MODULE:
        raise ValueError(
            f"{path} trains {model.get('class_path')}: mfm plan knows jobs of {MODULE}, PromptAlignment and "
            "PromptFinetuning"
        )
    arguments = model.get("init_args") or {}
    if "network" not in arguments:
        raise ValueError(f"{path}: model.init_args has no network")
    fake = FakeTensorMode()
    made = _instantiate(path, {k: arguments.get(k) for k in ("network", "objective", "execution")}, fake)
    return plan_training(
        made.network,
        made.objective,
        batch_size or _batch_size(config),
        devices or _devices(trainer),
        trainer.get("accumulate_grad_batches", 1),
        "bf16" if "bf16" in str(trainer["precision"]) else "fp32",
        made.execution,
        fake,
        reference,
        memory,
    )


def show(plan: Plan, memory: float) -> None:
    """Print a plan."""
    terminal = console()
    samples = plan.devices * plan.batch_size * plan.accumulate
    terminal.print(f"{plan.parameters / 1e6:,.2f} M trained parameters, {plan.teacher / 1e6:,.2f} M of the teacher")
    terminal.print(
        f"a step: {samples:,} samples on {plan.devices} devices ({plan.batch_size} each"
        f"{f', {plan.accumulate} times' if plan.accumulate > 1 else ''}), {plan.flops / 1e12:,.2f} TFLOP on each"
    )
    table = Table("GB on each device", "DDP", "FSDP")
    columns = [plan.memory(sharded) for sharded in (False, True)]
    for name in dict.fromkeys([*columns[0], *columns[1]]):
        table.add_row(name, *[f"{column[name] / 1e9:,.2f}" if name in column else "" for column in columns])
    totals = [sum(column.values()) / 1e9 for column in columns]
    table.add_row("sum", *[f"{total:,.2f}{'' if total < memory else '  (too much)'}" for total in totals], style="bold")
    if plan.most is not None:
        table.add_row(f"most samples at once in {memory:g} GB", *[f"{samples:,}" for samples in plan.most])
    terminal.print(table)
    if plan.reference is not None:
        terminal.print(
            "activations of the straightforward step (the same terms by torch.func.jvp, attention as written): "
            f"{plan.reference / 1e9:,.2f} GB; this step's: {plan.activations / plan.reference:.2f} times that"
        )
    terminal.print(
        f"Of {memory:g} GB. Not counted: CUDA's context and NCCL's buffers (about 1 GB), what the allocator wastes, "
        "the VAE and rewards. Less memory: execution.checkpoint_activations, a smaller batch with accumulation, FSDP."
    )


def _instantiate(path: Path, settings: dict[str, Any], fake: FakeTensorMode) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--network", type=nn.Module)
    parser.add_argument("--objective", type=Objective)
    parser.add_argument("--execution", type=TrainingExecution | None, default=None)
    try:
        parsed = parser.parse_object({k: v for k, v in settings.items() if v is not None})
        if missing := missing_sizes(parsed.network):
            _fill_from_data(path, parsed.network, missing)
        with fake:
            return parser.instantiate(parsed)
    except (argparse.ArgumentError, TypeError) as error:
        raise ValueError(f"{path}: {explain(str(error))}") from error


def _fill_from_data(path: Path, network: Any, missing: list[str]) -> None:
    try:
        fill_sizes(network, data_of_config(path))
    except (OSError, ImportError, ValueError) as error:
        hint = "to plan without the data, set them in network.init_args"
        raise ValueError(f"{path} leaves the network's {', '.join(missing)} to its data: {error} ({hint})") from error


def _batch_size(config: dict[str, Any]) -> int:
    found = config.get("data", {}).get("init_args", {}).get("batch_size")
    if found is None:
        raise ValueError("the config's data has no batch_size: give --batch_size")
    return int(found)


def _devices(trainer: dict[str, Any]) -> int:
    devices = trainer["devices"]
    if isinstance(devices, list):
        devices = len(devices)
    if not isinstance(devices, int) or devices < 1:
        raise ValueError(f"the config's devices are {devices!r}: say how many by --devices")
    return devices * int(trainer.get("num_nodes", 1))
