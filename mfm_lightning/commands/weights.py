"""`mfm import` and `mfm export`: released weights to ours, and back."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Literal

from mfm_lightning.commands.errors import CommandLineError

log = logging.getLogger(__name__)


def import_weights(
    path: str,
    *,
    output: Path,
    source: Literal["mfm", "dmf", "sit"] = "mfm",
    input_size: int | None = None,
    patch_size: int | None = None,
    in_channels: int | None = None,
    hidden_size: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    encoder_depth: int | None = None,
    num_classes: int | None = None,
    guidance_scales: list[float] | None = None,
    flip_time: bool | None = None,
    allow_download: bool = False,
    revision: str | None = None,
) -> None:
    """Convert released MFM, DMF or SiT weights to a model.safetensors of ours.

    Sizes are read from the shapes; those given here win.

    Args:
        path: a file, or a Hugging Face repository, org/name or org/name/file.
        output: file to write, .safetensors.
        source: whose weights they are.
        input_size: height and width of a state.
        patch_size: of a token.
        in_channels: of a state.
        hidden_size: width of the transformer.
        depth: number of blocks.
        num_heads: of each block's attention.
        encoder_depth: number of the encoder's blocks.
        num_classes: number of labels.
        guidance_scales: class-guidance scales besides 1, as trained.
        flip_time: the weights take t=1 for noise, which is taken for granted; --no_flip_time for the original SiT.
        allow_download: fetch the file where it is not on this machine.
        revision: of a Hugging Face repository.

    Raises:
        CommandLineError, FileNotFoundError, CheckpointError: as `import_checkpoint`.
    """
    if output.suffix != ".safetensors":
        raise CommandLineError(f"--output {output}: expected a name that ends in .safetensors")
    from mfm_lightning.checkpoints import find_file, import_checkpoint, imported_kind, save_model

    file = find_file(path, allow_download, revision)
    model = import_checkpoint(
        file, source, input_size=input_size, patch_size=patch_size, in_channels=in_channels, hidden_size=hidden_size,
        depth=depth, num_heads=num_heads, encoder_depth=encoder_depth, num_classes=num_classes,
        guidance_scales=guidance_scales, flip_time=flip_time,
    )  # fmt: skip
    save_model(model, output, {"kind": imported_kind(file, source), "imported_from": f"{source}: {path}"})
    log.info("%s (%s) written to %s: %s", path, source, output, model.network.config)


def export_weights(
    path: str,
    *,
    output: Path,
    names: Literal["release", "own"] = "release",
    prefix: str = "dit.",
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    decoder: str | None = None,
    data: str | None = None,
    licence: str | None = None,
    command: str | None = None,
    average: bool = True,
) -> None:
    """Convert a model.safetensors of ours to the released MFM's parameter names, make a file to be published of it, or
    the model.safetensors of a run's last.ckpt.

    Of a last.ckpt, one file or a folder of shards, the network is written as mfm fit would at its end: by one process,
    without a GPU.

    With --names own: a smaller file (--dtype), whose metadata say how it was made and what mfm test measured in its
    folder, and a section on it in the README.md (model card) beside it.

    Args:
        path: a model.safetensors that was written here, a name such as mnist, or the last.ckpt of a run.
        output: file to write, .safetensors, or .pt, .pth, .ckpt (a state_dict; only with the release's names).
        names: of the parameters; those of the release, or our own.
        prefix: before each of the release's names; the release's if left out.
        dtype: of the weights in the file; as they are if left out. They are loaded in fp32.
        decoder: said in the file: what mfm sample decodes with, such as pixel.
        data: said in the file: what it was trained on.
        licence: said in the file: of the weights.
        command: said in the file: what made it.
        average: of a last.ckpt, the averaged weights (EMA) where there are any; --no_average for those of the last
            step.

    Raises:
        CommandLineError: for options of the other names.
        FileNotFoundError, CheckpointError, ValueError: as `load_model` and `export_checkpoint`.
    """
    from mfm_lightning.checkpoints import export_checkpoint, find_weights, load_model, read_metadata
    from mfm_lightning.training.consolidation import consolidate, is_checkpoint

    if is_checkpoint(path):
        others = {"dtype": dtype, "decoder": decoder, "data": data, "licence": licence, "command": command}
        idle = [key for key, given in others.items() if given is not None] + ["prefix"] * (prefix != "dit.")
        if idle or output.suffix != ".safetensors":
            what = f"--{idle[0]}" if idle else f"--output {output}"
            raise CommandLineError(
                f"{what}: of a last.ckpt the output is a .safetensors in our own names; mfm export of that file does "
                "the rest"
            )
        said = consolidate(path, output, average)
        weights = "averaged weights" if said["averaged"] == "true" else "weights"
        log.info("%s of step %s of %s written to %s", weights, said["step"], path, output)
        return
    if not average:
        raise CommandLineError(f"--no_average is for the last.ckpt of a run, and {path} is none")
    file = find_weights(path)
    said = {"decoder": decoder, "data": data, "licence": licence, "command": command}
    said = {key: text for key, text in said.items() if text is not None}
    if names == "own":
        if output.suffix != ".safetensors" or prefix != "dit.":
            raise CommandLineError(f"--names own: expected --output NAME.safetensors, without --prefix, got {output}")
        _publish(file, output, dtype, said)
        return
    if said or dtype:
        given = next(iter(said), "dtype")
        raise CommandLineError(f"--{given} is for --names own: the release's files have no place for it")
    model, kind = load_model(file), read_metadata(file).get("kind", "meta_flow_map")
    export_checkpoint(model, output, prefix, kind)
    log.info("%s (%s) written to %s", path, kind, output)


def _publish(file: Path, output: Path, dtype: str | None, said: dict[str, str]) -> None:
    """Write the network of a file again, with what is said of it, and the section of its model card."""
    from mfm_lightning.networks.card import write_card
    from mfm_lightning.networks.files import load_any, said_in, save_network
    from mfm_lightning.networks.results import measured_of
    from mfm_rewards.execution import DTYPES, check_precision

    network = load_any(file)  # before anything is written
    if tables := measured_of(network, file.parent / "test"):
        said["measured"] = json.dumps(tables)
    said = {**said_in(file), **said}
    if dtype in ("bf16", "fp16") and ("measured" in said or "accuracy" in said):
        said["measured_on"] = f"the weights before they were rounded to {dtype}"
    output.parent.mkdir(parents=True, exist_ok=True)
    save_network(network, output, said, None if dtype is None else DTYPES[check_precision(dtype)])
    folder = output.parent
    intro = f"# {folder.resolve().name}\n\nWeights for mfm-lightning; `mfm export` wrote this page from the files."
    readme = write_card(folder, output, output.name, intro)
    log.info("%s written to %s, described in %s", file, output, readme)
