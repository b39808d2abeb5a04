"""Prompts: class names, templates with a class name, and a cache of encoded prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import as_file, files
from pathlib import Path

import torch
from torch import Tensor

from mfm_rewards.text_lists import TextListError, read_list

PLACEHOLDER = "{class}"


def imagenet_classes() -> list[str]:
    """Names of the 1,000 ImageNet classes by label; `data/imagenet_classes.txt` says where they are from."""
    with as_file(files("mfm_rewards").joinpath("data/imagenet_classes.txt")) as path:
        return [entry.name for entry in read_list(path)]


def load_class_names(path: str | Path | None = None) -> list[str]:
    """Class names, by label.

    Args:
        path: a text file with one name a line (lines that begin with # are comments), a JSON list, a JSON object
            `{label: name}`, or what else `text_lists.read_list` reads; ImageNet's names where None.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if its content is something else, labels are missing, or it has WordNet ids without names.
    """
    if path is None:
        return imagenet_classes()
    if not Path(path).is_file():
        raise FileNotFoundError(f"no class names at {path}")
    entries = read_list(path)
    if bare := next((entry.name for entry in entries if entry.name == entry.wordnet), None):
        raise TextListError(f"{path} has WordNet ids ({bare}), and no names beside them: prompts need names")
    return [entry.name for entry in entries]


def class_prompts(template: str, names: Sequence[str]) -> list[str]:
    """A template such as "a photograph of a {class}.", once for each name.

    Raises:
        ValueError: if it has no {class}.
    """
    if PLACEHOLDER not in template:
        raise ValueError(f"the template {template!r} has no {PLACEHOLDER}")
    return [template.replace(PLACEHOLDER, name) for name in names]


class PromptCache:
    """Encoded prompts; each is encoded once and kept.

    Args:
        encode: N prompts to `(N, ...)`; called without gradients.
        max_size: largest number of prompts kept; beyond it, all are forgotten.
        max_rows: largest number of prompts encoded at once.
    """

    def __init__(self, encode: Callable[[list[str]], Tensor], max_size: int = 8192, max_rows: int = 64) -> None:
        self.encode, self.max_size, self.max_rows = encode, max_size, max_rows
        self._known: dict[str, Tensor] = {}

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """`(B, ...)` of B prompts."""
        new = [p for p in dict.fromkeys(prompts) if p not in self._known]
        if len(self._known) + len(new) > self.max_size:
            self._known.clear()
            new = list(dict.fromkeys(prompts))
        # not in inference mode: its tensors cannot take part in a gradient later
        with torch.inference_mode(False), torch.no_grad():
            for i in range(0, len(new), self.max_rows):
                part = new[i : i + self.max_rows]
                self._known.update(zip(part, self.encode(part).unbind(), strict=True))
        return torch.stack([self._known[p] for p in prompts])

    def clear(self) -> None:
        """Forget all, as after a move to another device."""
        self._known.clear()

    def __len__(self) -> int:
        return len(self._known)
