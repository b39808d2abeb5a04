"""`mfm plan`: what a training config will need, before any of its files, data or devices are there."""

from __future__ import annotations

from pathlib import Path


def plan(*, config: Path, devices: int | None = None, batch_size: int | None = None, memory: float = 80.0) -> None:
    """Tell parameters, operations and memory of a training step on each GPU, under DDP and FSDP.

    Computed without the config's files, data or devices; of the data only the sizes that the network leaves to them.

    Args:
        config: YAML of mfm fit: its path, or the name of a packaged one, such as imagenet256/mfm_b2.
        devices: GPUs in all; the config's where left out.
        batch_size: samples on each GPU; the config's where left out.
        memory: of a GPU, in GB.

    Raises:
        FileNotFoundError: if there is no such config.
        ValueError: if it is not one of `MFMPretraining`, or a setting is unknown.
    """
    from mfm_lightning.commands.config_plan import plan_config, show

    show(plan_config(config, devices, batch_size), memory)
