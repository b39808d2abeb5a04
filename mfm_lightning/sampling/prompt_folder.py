"""A folder of images of prompts: where each stands, a JSON line for each, and what is still missing."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfm_lightning.interpolant import sample_generators
from mfm_lightning.sampling.outputs import encode_png
from mfm_lightning.sampling.prompts import Prompt
from mfm_lightning.sampling.resumable import DELETE, ResumableFolder, plain
from mfm_lightning.utils.atomic import save_json, whole_file
from mfm_lightning.utils.images import to_uint8


@dataclass(frozen=True)
class PromptImage:
    """Image `number` of a prompt; `index` counts all images, those of one prompt next to each other."""

    index: int
    prompt: Prompt
    prompt_index: int
    number: int

    def noise_key(self, seed: int) -> tuple[int, int]:
        """Seed and number of its noise: those of its prompt where that has a seed, else these and its index."""
        return (seed, self.index) if self.prompt.seed is None else (self.prompt.seed, self.number)

    def method_generator(self, seed: int) -> torch.Generator:
        """Of the noise that a method draws for it besides x0."""
        seed, number = self.noise_key(seed)
        return sample_generators((seed, 1), [number])[0]


def _flat(image: PromptImage) -> str:
    return f"{image.index:06d}.png"


def _geneval(image: PromptImage) -> str:
    return f"{image.prompt_index:05d}/samples/{image.number:04d}.png"


def _compbench(image: PromptImage) -> str:
    text = image.prompt.text.strip()
    if "_" in text or "/" in text:
        raise ValueError(f"prompt {image.prompt_index}, {text!r}: T2I-CompBench's file names allow no '_' and no '/'")
    return f"samples/{text}_{image.index:06d}.png"


def _unigenbench(image: PromptImage) -> str:
    return f"{image.prompt.more.get('index', image.prompt_index)}_{image.number}.png"


# where evaluators look for images: github.com/djghosh13/geneval, Karine-Huang/T2I-CompBench, CodeGoat24/UniGenBench
LAYOUTS: dict[str, Callable[[PromptImage], str]] = {
    "flat": _flat,
    "geneval": _geneval,
    "compbench": _compbench,
    "unigenbench": _unigenbench,
}


class PromptFolder(ResumableFolder):
    """Images of prompts, and `lines_RANK.jsonl`: of each image a line with its prompt, file, and what was measured.

    An image is there when its file and its line are; a run that was killed goes on with the others. Several processes
    may write, each its own lines.

    Args:
        path: is made where it is not there.
        prompts: of all images.
        images_per_prompt: at least 1.
        layout: names of the files: "flat" (INDEX.png), "geneval" (with `metadata.jsonl` beside `samples/`), "compbench"
            or "unigenbench", as these evaluators read them.
        rank: of this process.

    Attributes:
        images: all of them, by index.
        files: their names in the folder, in the same order.

    Raises:
        ValueError: for an unknown layout, or a prompt that it cannot name.
    """

    note, what = "prompts.json", "images"

    def __init__(
        self,
        path: str | Path,
        prompts: Sequence[Prompt],
        images_per_prompt: int = 1,
        layout: str = "flat",
        rank: int = 0,
    ) -> None:
        if layout not in LAYOUTS:
            raise ValueError(f"unknown layout {layout!r}: expected one of {', '.join(LAYOUTS)}")
        if images_per_prompt < 1:
            raise ValueError(f"images_per_prompt {images_per_prompt} must be at least 1")
        super().__init__(path)
        self.layout, self.images_per_prompt = layout, images_per_prompt
        self.prompts, self._lines = list(prompts), self.path / f"lines_{rank}.jsonl"
        self.images = [
            PromptImage(p * images_per_prompt + k, prompt, p, k)
            for p, prompt in enumerate(self.prompts)
            for k in range(images_per_prompt)
        ]
        files = [LAYOUTS[layout](image) for image in self.images]
        if twice := [file for file, number in Counter(files).items() if number > 1]:
            raise ValueError(f"layout {layout}: {len(twice)} names would be of several images, first {twice[0]}")
        longest = max(files, key=lambda file: len(Path(file).name.encode()), default="")
        if len(Path(longest).name.encode()) > 220:  # of the 255 that file systems take; a partial file's is longer
            raise ValueError(f"layout {layout}: the name {Path(longest).name[:60]}... is too long for a file")
        self.files = files

    def claim(self, settings: Mapping[str, Any], remedy: str = DELETE) -> None:
        """As `ResumableFolder.claim`, with layout and prompts among the settings."""
        prompts = [[prompt.text, prompt.seed, dict(prompt.more)] for prompt in self.prompts]
        own = {"layout": self.layout, "images_per_prompt": self.images_per_prompt, "prompts": prompts}
        super().claim({**settings, **own}, remedy)

    def begun(self) -> bool:
        return any(self.path.glob("lines_*.jsonl"))

    def there(self) -> set[int]:
        return {line["index"] for line in self.lines()}

    def lines(self) -> list[dict[str, Any]]:
        """Of all images that are there, by index; the newest line of each counts."""
        every = [line for path in self.path.glob("lines_*.jsonl") for line in _read(path)]
        found = {line["index"]: line for line in sorted(every, key=lambda line: line.get("written", 0.0))}
        return [found[i] for i in sorted(found) if (self.path / found[i]["file"]).is_file()]

    def missing(self) -> list[PromptImage]:
        """Images that are not there."""
        return [self.images[index] for index in self.left(len(self.images))]

    def write_beside(self, kind: str, index: int, image: Tensor) -> None:
        """Store another image of the same index as `KIND/INDEX.png`, which evaluators do not look for."""
        _store(image, self.path / kind / f"{index:06d}.png")

    def write(self, index: int, image: Tensor, measured: Mapping[str, Any]) -> None:
        """Store an image `(C, H, W)` in [0, 1], and its line."""
        one = self.images[index]
        file = self.path / self.files[index]
        if self.layout == "geneval":
            metadata = {"prompt": one.prompt.text, **one.prompt.more}
            save_json(metadata, file.parents[1] / "metadata.jsonl", indent=None, ensure_ascii=False, default=plain)
        _store(image, file)
        line = {"index": index, "prompt_index": one.prompt_index, "number": one.number, "prompt": one.prompt.text}
        line |= {"file": self.files[index], **measured, "written": round(time.time(), 3)}
        text = json.dumps(line, ensure_ascii=False, default=plain) + "\n"
        with open(self._lines, "a", encoding="utf-8") as lines:
            lines.write(text if _ends_with_a_line(self._lines) else f"\n{text}")


def _store(image: Tensor, file: Path) -> None:
    with whole_file(file) as partial:
        partial.write_bytes(encode_png(to_uint8(image[None])[0].cpu()))


def _ends_with_a_line(path: Path) -> bool:
    """Not where a kill has left half of one."""
    if not path.is_file() or not path.stat().st_size:
        return True
    with open(path, "rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines; a kill may have left half of one."""
    for text in path.read_text(encoding="utf-8").split("\n"):  # a prompt may have U+2028 in it
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "index" in line and "file" in line:
            yield line
