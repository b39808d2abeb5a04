"""`mfm import` and `mfm export`: released weights to ours, and back."""

from __future__ import annotations

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


def export_weights(path: Path, *, output: Path, prefix: str = "dit.") -> None:
    """Convert a model.safetensors of ours to the released MFM's parameter names.

    Args:
        path: a model.safetensors that was written here.
        output: file to write, .safetensors, or .pt, .pth, .ckpt (a state_dict).
        prefix: before each name; the release's if left out.

    Raises:
        FileNotFoundError, CheckpointError, ValueError: as `load_model` and `export_checkpoint`.
    """
    from mfm_lightning.checkpoints import export_checkpoint, load_model, read_metadata

    model, kind = load_model(path), read_metadata(path).get("kind", "meta_flow_map")
    export_checkpoint(model, output, prefix, kind)
    log.info("%s (%s) written to %s", path, kind, output)
