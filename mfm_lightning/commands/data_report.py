"""What the data section of a config gives: tables and a picture."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from jsonargparse import ArgumentParser
from torch import Tensor

from mfm_lightning.commands.errors import explain
from mfm_lightning.commands.imports import import_modules
from mfm_lightning.conditions import Conditions
from mfm_lightning.data import ImageDataModule, OffPolicyDataModule, StepDataModule
from mfm_lightning.data.images import LabelledImages
from mfm_lightning.data.images.reading import refused
from mfm_lightning.data.skipped import Corrupt
from mfm_lightning.utils.configs import find_config, read_config
from mfm_lightning.utils.console import console, write_table
from mfm_lightning.utils.decoding import ImageError
from mfm_lightning.utils.figures import image_grid

_COLUMNS, _ROWS, _LOOKED_AT = 8, 20, 100


def report(config: Path, folder: Path, pictures: int, source: str | None = None) -> None:
    """Print what a config's data are, and write `classes.csv`, `classes.json` and `batch.png`.

    Args:
        config: path or name of the config.
        folder: to write to.
        pictures: images of the batch that are drawn.
        source: in place of the config's own.

    Raises:
        FileNotFoundError: if there is no such config, or what it reads is not there.
        ValueError: as `data_of_config`; if the data cannot be read.
    """
    data = data_of_config(find_config(config), source)
    terminal = console()
    if isinstance(data, ImageDataModule):
        terminal.print(data.summary())
        terminal.print(f"sizes of {sizes_line(data.sources['train'], data.corrupt)}")
    data.setup()
    shape = " x ".join(map(str, data.state_shape))
    terminal.print(f"states {shape}, {data.num_classes} classes, batches of {data.batch_size} on each device")
    if isinstance(data, ImageDataModule):
        fits = "held in memory" if data.in_memory else f"more than memory: {data.memory:g}, decoded for each batch"
        terminal.print(f"{data.megabytes:,.3g} MB decoded, {fits}")
    _classes(data, folder)
    _picture(data, folder / "batch.png", pictures)
    if skipped := getattr(data, "skipped", 0):
        terminal.print(f"skipped of what was read, for it cannot be decoded: {skipped}")


def data_of_config(path: Path, source: str | None = None) -> StepDataModule:
    """The DataModule of a config, reading `source` in place of its own where given; of fine-tuning, the one under
    `OffPolicyDataModule`.

    Raises:
        ValueError: if the config has no data section, one of unknown settings, or one without training batches by step.
    """
    config = read_config(path)
    imports = config.get("imports") or []
    import_modules([imports] if isinstance(imports, str) else imports)
    if not isinstance(config.get("data"), dict):
        raise ValueError(f"{path} has no data section: expected data: {{class_path: ..., init_args: ...}}")
    if source is not None:
        config["data"].setdefault("init_args", {})["source"] = source
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=L.LightningDataModule)
    try:
        found: Any = parser.instantiate(parser.parse_object({"data": config["data"]})).data
    except (argparse.ArgumentError, TypeError) as error:
        raise ValueError(f"{path}: {explain(str(error))}") from error
    found = found.data if isinstance(found, OffPolicyDataModule) else found
    if not isinstance(found, StepDataModule):
        raise ValueError(f"{path}: {type(found).__name__} has no training batches to show: expected a StepDataModule")
    return found


def sizes_line(source: LabelledImages, corrupt: Corrupt = "raise") -> str:
    """The sizes of up to a hundred images, the most frequent first.

    Raises:
        ImageError: for one that cannot be decoded, unless such are skipped.
    """
    rows = np.unique(np.linspace(0, len(source.labels) - 1, _LOOKED_AT).round().astype(int)).tolist()
    sizes: Counter[str] = Counter()
    for i in rows:
        try:
            image = source.image(i)
            sizes[f"{image.width} x {image.height} {'grey' if image.mode == 'L' else 'colour'}"] += 1
        except ImageError as error:
            if corrupt == "raise":
                raise refused(error) from error
            sizes["cannot be decoded"] += 1
    shown = [f"{size} ({number})" for size, number in sizes.most_common(5)]
    return f"{len(rows)} of the images: {', '.join(shown)}{', ...' if len(sizes) > 5 else ''}"


def _classes(data: StepDataModule, folder: Path) -> None:
    counts = data.label_counts()
    if not counts or not data.num_classes:
        return
    names = _names(data)
    rows = [{"label": i, "name": names[i]} | {k: int(c[i]) for k, c in counts.items()} for i in range(len(names))]
    total = {"label": "", "name": "all"} | {name: int(count.sum()) for name, count in counts.items()}
    more = {key: "..." for key in total}
    shown = [*rows, total] if len(rows) <= _ROWS else [*rows[: _ROWS - 2], more, rows[-1], total]
    write_table(rows, "images by class", folder, "classes", shown=shown)


def _picture(data: StepDataModule, path: Path, pictures: int) -> None:
    x, given = data.train_batch(0)
    if x.dim() != 4:
        console().print(f"no picture: states of shape {tuple(data.state_shape)} are no images")
        return
    x, label = x[:pictures], Conditions.of_batch(given).label
    images = data.decode(x).detach()
    if images.shape[1] not in (1, 3):
        console().print(f"no picture: states of {images.shape[1]} channels need a decoder (data.init_args.decoder)")
        return
    columns = min(_COLUMNS, len(images))
    missing = -len(images) % columns
    rows = images.new_ones(len(images) + missing, *images.shape[1:])
    rows[: len(images)] = images
    captions = None if label is None else _captions(label[:pictures], _names(data), missing, columns)
    title = f"training batch 0, {len(images)} of {data.batch_size} images"
    image_grid(rows.unflatten(0, (-1, columns)), path, title, captions=captions)
    console().print(f"written: {path}")


def _captions(label: Tensor, names: list[str], missing: int, columns: int) -> list[list[str]]:
    texts = [names[int(i)][:12] if int(i) < len(names) else "" for i in label] + [""] * missing
    return [texts[i : i + columns] for i in range(0, len(texts), columns)]


def _names(data: StepDataModule) -> list[str]:
    return list(getattr(data, "class_names", None) or map(str, range(data.num_classes)))
