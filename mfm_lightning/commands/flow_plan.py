"""The plan of a text-to-image config: memory of its flow's parts, and of what its method does."""

from __future__ import annotations

import argparse
import inspect
import logging
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from rich.table import Table

from mfm_lightning.alignment import AlignmentMethod
from mfm_lightning.backbones import load_flow
from mfm_lightning.commands.errors import explain
from mfm_lightning.commands.flow_planning import FlowPlan, plan_flow
from mfm_lightning.utils.console import console

MODULE = "mfm_lightning.modules.PromptAlignment"
LOADER = "mfm_lightning.backbones.load_flow"
log = logging.getLogger(__name__)
PASSED = (
    *("name", "image_size", "torch_dtype", "max_rows", "attention", "tiled", "true_guidance"),
    *("vae", "max_sequence_length", "gradient_vae"),
)


def plan_prompts(path: Path, config: dict[str, Any], **changed: Any) -> tuple[FlowPlan, dict[str, Any]]:
    """Plan a job of `PromptAlignment`.

    Args:
        path: of the config, for messages.
        config: what it holds.
        changed: `batch_size`, `image_size`, `max_rows` and `torch_dtype` in place of the config's; None leaves it.

    Returns:
        The plan, and what `show` says of the job: `method`, `gradient`, `checkpointing`, `batch_size`, `dtype`.

    Raises:
        FileNotFoundError, ImportError, ValueError: as `plan_flow`; ValueError also for settings that do not fit.
    """
    arguments = config["model"].get("init_args") or {}
    flow = arguments.get("flow") or {}
    if flow.get("class_path") != LOADER:
        raise ValueError(f"{path}: model.init_args.flow is {flow.get('class_path')!r}: mfm plan knows {LOADER}")
    usual = {name: p.default for name, p in inspect.signature(load_flow).parameters.items()}
    given = flow.get("init_args") or {}
    if unknown := [name for name in given if name not in usual]:
        raise ValueError(f"{path}: load_flow has no {unknown[0]!r}, only {', '.join(usual)}")
    if "name" not in given:
        raise ValueError(f"{path}: model.init_args.flow.init_args has no name of a flow")
    if given.get("flow_map") is not None:
        raise ValueError(f"{path}: mfm plan knows no flow_map: leave it out, and add the size of its file")
    of_flow = {**usual, **given} | {k: v for k, v in changed.items() if v is not None and k in usual}
    if of_flow["max_rows"] == "auto":  # which takes what is left
        log.info("max_rows: auto is planned as 1, the least that it takes")
        of_flow["max_rows"] = 1
    batch_size = changed.get("batch_size") or (config.get("data", {}).get("init_args") or {}).get("batch_size", 8)
    described = arguments.get("method")
    method: AlignmentMethod | None = described and part_of(path, "method", AlignmentMethod, described)
    found = plan_flow(
        **{name: of_flow[name] for name in PASSED},
        guidance=arguments.get("guidance"),
        batch_size=batch_size,
        method=method,
    )
    about = {
        "name": of_flow["name"],
        "method": type(method).__name__ if method else "the base flow",
        "gradient": method is not None and method.needs_reward_gradient,
        "checkpointing": bool(of_flow["checkpointing"]),
        "batch_size": batch_size,
        "dtype": of_flow["torch_dtype"],
    }
    return found, about


def show(plan: FlowPlan, about: dict[str, Any], memory: float) -> None:
    """Print a plan."""
    terminal = console()
    height, width = plan.image_size
    terminal.print(
        f"{about['name']}: images of {height} x {width} in {about['dtype']}, by {about['method']}, "
        f"{about['batch_size']} at once ({plan.rows} states in the flow, max_rows {plan.max_rows})"
    )
    terminal.print(f"sizes: {plan.source}", markup=False)
    table = Table("part", "M parameters", "GB")
    for name, number in plan.parameters.items():
        table.add_row(name, f"{number / 1e6:,.2f}", f"{plan.weights[name] / 1e9:,.2f}")
    terminal.print(table)
    table = Table("work", "GB at most, besides weights")
    for name, size in plan.peaks.items():
        table.add_row(name, f"{size / 1e9:,.2f}")
    terminal.print(table)
    total = plan.total(about["gradient"], about["checkpointing"]) / 1e9
    how = "no gradients" if not about["gradient"] else f"gradients, checkpointing {str(about['checkpointing']).lower()}"
    terminal.print(
        f"this job: {total:,.2f} GB of {memory:g}{'' if total < memory else ' (too much)'} for transformer, VAE and "
        f"{how}. Text encoders ({plan.encoders / 1e9:,.2f} GB) are where encoder_device says, the CPU if left out, and "
        "are dropped after encoding."
    )
    terminal.print(
        "Not counted: rewards, CUDA's context (about 0.5 GB), workspaces of libraries, what the allocator wastes. Less "
        "memory: checkpointing, tiled, a smaller batch_size, max_rows or image_size."
    )


def part_of(path: Path, name: str, kind: Any, described: Any) -> Any:
    """An object that a config describes.

    Args:
        path: of the config, for messages.
        name: of the part, likewise.
        kind: its class.

    Raises:
        ValueError: for settings that do not fit.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{name}", type=kind)
    try:
        return parser.instantiate(parser.parse_object({name: described}))[name]
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {explain(str(error))}") from error
