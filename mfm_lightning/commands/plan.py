"""`mfm plan`: what a job will need, before any of its files, data or devices are there."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mfm_lightning.commands.errors import CommandLineError


def plan(
    *,
    config: Path,
    devices: int | None = None,
    batch_size: int | None = None,
    memory: float = 80.0,
    image_size: int | None = None,
    max_rows: int | None = None,
    torch_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    reference: bool = False,
    largest_batch: bool = False,
) -> None:
    """Tell parameters, operations and memory of a training step, or memory of a text-to-image job, on each GPU.

    Computed without the config's files, data or devices; of the data only the sizes that the network leaves to them, of
    a text-to-image flow only the configs of its folder, where that is there. Training is planned under DDP and FSDP.

    Args:
        config: YAML of mfm fit, or one of a text-to-image job: its path, or the name of a packaged one, such as
            imagenet256/mfm_b2 or text_to_image/sd3/steer.
        devices: GPUs in all, of training; the config's where left out.
        batch_size: samples on each GPU; the config's where left out.
        memory: of a GPU, in GB.
        image_size: text-to-image; pixels of a side, in place of the config's.
        max_rows: text-to-image; states at once in transformer and VAE, in place of the config's.
        torch_dtype: text-to-image; floating type of the flow, in place of the config's.
        largest_batch: training; look for the most samples that fit, which takes minutes for large networks.
        reference: training; tell what the activations would take by torch.func.jvp and attention as written.

    Raises:
        CommandLineError: for an option of the other kind of config.
        FileNotFoundError: if there is no such config, or no sizes of a flow.
        ValueError: if it is of another module than `MFMPretraining`, `PromptAlignment` and `PromptFinetuning`, or a
            setting is unknown.
    """
    from mfm_lightning.commands import flow_plan
    from mfm_lightning.utils.configs import find_config, read_config

    if (batch_size or 1) < 1 or (max_rows or 1) < 1:
        raise CommandLineError(f"--batch_size {batch_size} and --max_rows {max_rows} must be at least 1")
    file = find_config(config)
    settings = read_config(file)
    of_flow = {"image_size": image_size, "max_rows": max_rows, "torch_dtype": torch_dtype}
    if (settings.get("model") or {}).get("class_path") == flow_plan.MODULE:
        if devices is not None:
            raise CommandLineError("--devices is for training: each device of a text-to-image job has the whole flow")
        _refuse_of_training(reference, largest_batch)
        flow_plan.show(*flow_plan.plan_prompts(file, settings, batch_size=batch_size, **of_flow), memory)
        return
    from mfm_lightning.commands import adapter_plan

    if adapter_plan.trains_adapter(settings):
        if devices is not None:
            raise CommandLineError("--devices changes nothing for an adapter: each device has the whole flow under ddp")
        _refuse_of_training(reference, largest_batch)
        adapter_plan.show(adapter_plan.plan_adapter(file, settings, batch_size, **of_flow), memory)
        return
    if given := [name for name, value in of_flow.items() if value is not None]:
        raise CommandLineError(f"--{given[0]} is for text-to-image configs: {file} is none")
    from mfm_lightning.commands.config_plan import plan_config, show

    show(plan_config(file, devices, batch_size, reference, memory * 1e9 if largest_batch else None), memory)


def _refuse_of_training(reference: bool, largest_batch: bool) -> None:
    for name, given in (("reference", reference), ("largest_batch", largest_batch)):
        if given:
            raise CommandLineError(f"--{name} is for training by MFMPretraining of a network of its own")
