"""Model cards: what a file of weights says of itself, as Markdown."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from mfm_lightning.networks.files import read_metadata
from mfm_lightning.utils.atomic import whole_file

KINDS = {
    "meta_flow_map": "Meta Flow Map",
    "base_flow": "base flow",
    "flow_map": "flow map",
    "value": "value network",
    "classifier": "classifier of images",
}
# what a card says in a line each, by the key of a file's metadata
SAID = {"data": "Data", "licence": "Licence", "command": "Made by", "decoder": "Decoder", "measured_on": "Measured on"}


def card(path: str | Path, title: str | None = None) -> str:
    """A section on a file that `save_network` wrote, from its tensors and metadata; raises as `read_metadata`."""
    header, path = read_metadata(path), Path(path)
    config = json.loads(header.get("config", "{}"))
    with safe_open(path, framework="pt") as file:
        slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118 # it is no dictionary
        number = sum(math.prod(part.get_shape()) for part in slices)
        types = sorted({str(part.get_dtype()) for part in slices})
    kind = KINDS.get(header.get("kind", ""), "network")
    lines = [
        f"## {title or path.name}",
        "",
        f"A {kind}: `{header.get('network')}`, {number / 1e6:.2f} M parameters as {', '.join(types)}, "
        f"{path.stat().st_size / 1e6:.2f} MB" + (f", {int(header['step']):,} steps" if "step" in header else "") + ".",
        "",
        *[f"- {name}: {header[key]}" for key, name in SAID.items() if key in header],
        f"- Network: `{', '.join(f'{k}={v}' for k, v in config.items())}`",
    ]
    if "accuracy" in header:
        said = json.loads(header["accuracy"])
        lines.append(
            f"- Accuracy: {said['accuracy']:.2%} of {said['images']:,} test images "
            f"({said['low']:.2%} to {said['high']:.2%})"
        )
    for name, rows in json.loads(header.get("measured", "{}")).items():
        lines += ["", f"`mfm test`, {name}:", "", *_table(rows)]
    return "\n".join(lines) + "\n"


def write_card(folder: str | Path, path: Path, title: str, intro: str) -> Path:
    """Write the section of a file into a folder's README.md, between two comments (`<!-- mfm export TITLE -->`,
    `<!-- end -->`): in place of what stands between them, else at the end. Nothing else of the page changes.

    Args:
        title: of the section.
        intro: what a new README.md begins with.
    """
    readme = Path(folder) / "README.md"
    text = readme.read_bytes() if readme.is_file() else f"{intro}\n".encode()
    begin, end = f"<!-- mfm export {title} -->".encode(), b"<!-- end -->"
    section = b"\n".join([begin, card(path, title).strip().encode(), end])
    # one without its end would reach to that of another section
    marked = re.compile(rb"(?ms)^%s\s*$(?:(?!<!-- mfm export ).)*?^%s" % (re.escape(begin), re.escape(end)))
    if found := marked.search(text):
        text = text[: found.start()] + section + text[found.end() :]
    else:
        text = b"%s\n\n%s\n" % (text.rstrip(b"\n"), section)
    with whole_file(readme) as partial:
        partial.write_bytes(text)
    return readme


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = list(rows[0])
    body = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    return ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *body)]
