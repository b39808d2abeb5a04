"""A page as JSON: `page.json` has all that the page shows, so that it can be written again, or beside another run's."""

from __future__ import annotations

import base64
import io
import json
import math
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mfm_benchmarks import blocks, charts
from mfm_benchmarks.blocks import Page
from mfm_benchmarks.charts import Interval
from mfm_lightning.metrics.measured import Measured, of_parts
from mfm_lightning.utils.atomic import save_json, save_tensors

FILE, SAMPLES = "page.json", "samples.safetensors"
FORMAT = 1  # another number for a file that other code cannot read
LARGEST = 384  # pixels of a side of an image on the page
PHOTO = 96  # from so many pixels on an image is a JPEG
KINDS = {
    kind.__name__: kind
    for kind in (
        blocks.Summary, blocks.Headline, blocks.Text, blocks.Claims, blocks.Picture, blocks.Table, blocks.Pair,
        blocks.Drawing, charts.Interval, charts.Line, charts.Panel, charts.LineChart, charts.BarPanel, charts.BarChart,
        charts.Cloud, charts.CloudChart, charts.Strip, charts.Gallery, Page,
    )
}  # fmt: skip


def save_page(page: Page, path: Path) -> None:
    """Write all that the page shows as JSON."""
    save_json({"format": FORMAT, "page": _plain(page)}, path, indent=None)


def load_page(path: Path) -> Page:
    """The page that `save_page` has written.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is of another version, or damaged.
    """
    try:
        stored = json.loads(path.read_text())
        if stored["format"] != FORMAT:
            raise ValueError(f"its format is {stored['format']}, expected {FORMAT}")
        page = _built(stored["page"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): it is damaged, or of another version; write it again with "
            "mfm benchmark SUITE --report and the options of the run"
        ) from error
    if not isinstance(page, Page):
        raise ValueError(f"{path} is no page of a report")
    return page


def save_samples(page: Page, path: Path) -> None:
    """Write what each of the samples adds to the numbers of the tables, by which another run's are paired with them."""
    tensors, about = dict[str, Tensor](), dict[str, dict[str, Any]]()
    for table in (block for block in page.blocks if isinstance(block, blocks.Table)):
        for k, row in enumerate(table.rows):
            for column, number in row.items():
                if isinstance(number, Measured) and number.samples is not None and not math.isnan(number.error):
                    name = f"{table.name}/{k}/{column}"
                    tensors[name] = number.replicates if number.parts is None else number.parts
                    about[name] = {"value": number.value, "samples": number.samples, "scale": number.scale}
                    about[name] |= {"least": number.least, "parts": number.parts is not None}
    if tensors:
        stored = {name: tensor.detach().cpu().double().contiguous() for name, tensor in tensors.items()}
        save_tensors(stored, path, {"numbers": json.dumps(about)})
    else:
        path.unlink(missing_ok=True)


def load_samples(path: Path) -> dict[tuple[str, int, str], Measured]:
    """What `save_samples` has written, by table, row and column; empty if there is no such file.

    Raises:
        ValueError: if it is damaged.
    """
    if not path.is_file():
        return {}
    found = {}
    try:
        with safe_open(path, "pt") as file:
            for name, about in json.loads(file.metadata()["numbers"]).items():
                tensor, (value, scale, least) = file.get_tensor(name), (about[k] for k in ("value", "scale", "least"))
                table, row, column = name.split("/", 2)
                found[table, int(row), column] = (
                    of_parts(value, tensor, scale, least)
                    if about["parts"]
                    else Measured(value, tensor, samples=about["samples"], scale=scale, least=least)
                )
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}): it is damaged; write it again with --report") from error
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Measured):
        value = Interval.of(value)
    if isinstance(value, Tensor):
        return [encoded(image) for image in value]
    if isinstance(value, Figure):
        value = blocks.Drawing(svg_of(value))
    if is_dataclass(value) and type(value).__name__ in KINDS:
        return {"$kind": type(value).__name__} | {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _built(value: Any) -> Any:
    if isinstance(value, list):
        return [_built(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {key: _built(item) for key, item in value.items() if key != "$kind"}
    return KINDS[value["$kind"]](**found) if "$kind" in value else found


def svg_of(figure: Figure) -> str:
    """The figure as SVG text."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "page"}):  # the same figure is the same text
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def uris(images: Tensor | list[str]) -> list[str]:
    """Images as data URIs; those that were stored stay as they are."""
    return images if isinstance(images, list) else [encoded(image) for image in images]


def encoded(image: Tensor) -> str:
    """A data URI of an image `(C, H, W)` in [0, 1]: PNG of small ones, JPEG of photographs, at most 384 pixels wide."""
    pixels = (image.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).squeeze(-1)
    picture, buffer = Image.fromarray(pixels.numpy()), io.BytesIO()
    if max(picture.size) > LARGEST:
        picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    kind = "JPEG" if max(picture.size) >= PHOTO else "PNG"
    picture.save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {"optimize": True}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def decoded(text: str) -> Tensor:
    """The image `(C, H, W)` of a data URI of `encoded`."""
    picture = Image.open(io.BytesIO(base64.b64decode(text.partition(",")[2])))
    pixels = torch.from_numpy(np.array(picture)).float() / 255
    return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)
