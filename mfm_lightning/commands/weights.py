"""`mfm import` and `mfm export`: released weights to ours, and back."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from mfm_lightning.checkpoints import (
    SOURCES,
    export_checkpoint,
    find_file,
    import_checkpoint,
    imported_kind,
    load_model,
    read_metadata,
    save_model,
)

log = logging.getLogger(__name__)
_SIZES = {
    "input_size": "height and width of a state",
    "patch_size": "of a token",
    "in_channels": "of a state",
    "hidden_size": "width of the transformer",
    "depth": "number of blocks",
    "num_heads": "of each block's attention",
    "encoder_depth": "number of the encoder's blocks",
    "num_classes": "number of labels",
}


def import_main(args: Sequence[str]) -> None:
    """Entry point of `mfm import`; raises as `import_checkpoint`."""
    parser = argparse.ArgumentParser(
        prog="mfm import",
        description="Convert released MFM, DMF or SiT weights to a model.safetensors of ours. Sizes are read from the "
        "shapes; those given here win.",
    )
    parser.add_argument("path", help="a file, or a Hugging Face repository: org/name or org/name/file")
    parser.add_argument("--source", choices=SOURCES, default="mfm", help="whose weights; mfm if left out")
    parser.add_argument("--output", type=Path, required=True, help="file to write, .safetensors")
    for name, meaning in _SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=meaning)
    parser.add_argument("--guidance-scales", type=float, nargs="*", help="class-guidance scales besides 1, as trained")
    parser.add_argument(
        "--flip-time",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="the weights take t=1 for noise, which is taken for granted; --no-flip-time for the original SiT release",
    )
    parser.add_argument("--allow-download", action="store_true", help="fetch the file where it is not on this machine")
    parser.add_argument("--revision", help="of a Hugging Face repository")
    options = vars(parser.parse_args(args))
    output, source = options.pop("output"), options["source"]
    if output.suffix != ".safetensors":
        parser.error(f"--output {output}: expected a name that ends in .safetensors")
    path = options.pop("path")
    file = find_file(path, options["allow_download"], options["revision"])
    model = import_checkpoint(file, **options)
    save_model(model, output, {"kind": imported_kind(file, source), "imported_from": f"{source}: {path}"})
    log.info("%s (%s) written to %s: %s", path, source, output, model.network.config)


def export_main(args: Sequence[str]) -> None:
    """Entry point of `mfm export`; raises as `load_model` and `export_checkpoint`."""
    parser = argparse.ArgumentParser(
        prog="mfm export", description="Convert a model.safetensors of ours to the released MFM's parameter names."
    )
    parser.add_argument("path", type=Path, help="a model.safetensors that was written here")
    parser.add_argument(
        "--output", type=Path, required=True, help="file to write: .safetensors, or .pt, .pth, .ckpt (a state_dict)"
    )
    parser.add_argument("--prefix", default="dit.", help="before each name; 'dit.' if left out, as released")
    options = parser.parse_args(args)
    model, kind = load_model(options.path), read_metadata(options.path).get("kind", "meta_flow_map")
    export_checkpoint(model, options.output, options.prefix, kind)
    log.info("%s (%s) written to %s", options.path, kind, options.output)
