"""Which images are for training, validation and test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mfm_lightning.data.images.source import LabelledImages, names_line


@dataclass(frozen=True, eq=False)
class Split:
    """Images of a source.

    Args:
        source: that has them.
        rows: their numbers in it, `(N,)`.
        labels: `(N,)`, by the names of the training data.
    """

    source: LabelledImages
    rows: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def only(self, classes: Sequence[int]) -> Split:
        """The images of these labels."""
        return self.at(np.flatnonzero(np.isin(self.labels, classes)))

    def at(self, index: np.ndarray) -> Split:
        return Split(self.source, self.rows[index], self.labels[index])


def whole(source: LabelledImages, names: Sequence[str], where: str) -> Split:
    """All images of a source, with the labels that the training data give to classes of the same names.

    Raises:
        ValueError: for a class that the training data do not have.
    """
    labels = source.labels
    if list(source.class_names) != list(names):
        if unknown := [name for name in source.class_names if name not in names]:
            raise ValueError(
                f"{where} has a class {unknown[0]!r}, which the training images do not have ({names_line(names)})"
            )
        labels = np.array([names.index(name) for name in source.class_names])[labels]
    return Split(source, np.arange(len(labels)), labels)


def stratified(labels: np.ndarray, fractions: Sequence[float], seed: int = 0) -> list[np.ndarray]:
    """Indices of parts that have these fractions of each class, rounded, and last of what is left; each sorted.

    Each class keeps one for what is left. Classes so small that a fraction rounds to none give that fraction of all
    of them together, drawn among them.

    Args:
        labels: `(N,)`.
        fractions: of all parts but the last.
        seed: the parts are the same for the same seed.
    """
    random = np.random.default_rng(seed)
    parts: list[list[np.ndarray]] = [[] for _ in range(len(fractions) + 1)]
    small: list[np.ndarray] = []

    def deal(index: np.ndarray, ends: np.ndarray) -> None:
        for part, first, last in zip(parts, ends, [*ends[1:], len(index)], strict=True):
            part.append(index[first:last])

    for label in np.unique(labels):
        index = random.permutation(np.flatnonzero(labels == label))
        ends = np.round(np.cumsum([0.0, *fractions]) * len(index)).astype(int)
        if (np.diff(ends)[np.asarray(fractions) > 0] < 1).any():
            small.append(index)
            continue
        deal(index, np.minimum(ends, len(index) - 1))
    if small:
        spare = random.permutation(np.concatenate([index[1:] for index in small]))
        ends = np.round(np.cumsum([0.0, *fractions]) * sum(map(len, small))).astype(int)
        deal(spare, np.minimum(ends, len(spare)))
        parts[-1].extend(index[:1] for index in small)
    return [np.sort(np.concatenate(part)) for part in parts]


def labels_of(classes: Sequence[int | str], names: Sequence[str]) -> list[int]:
    """Labels of classes that are given by label or by name.

    Raises:
        ValueError: for one that there is not, and for a number that is the label of one class and the name of another.
    """
    found = []
    for each in classes:
        if isinstance(each, bool):
            raise ValueError(f"classes: {each} is no class; yes, no, on and off are names only in quotes")
        if isinstance(each, int) and 0 <= each < len(names) and str(each) in names and names[each] != str(each):
            raise ValueError(
                f"classes: {each} is the label of {names[each]!r} and the name of another class (label "
                f"{names.index(str(each))}): give names as text, '{each}' or {names[each]!r} in quotes"
            )
        if isinstance(each, str) and each in names:
            found.append(names.index(each))
        elif isinstance(each, int) and 0 <= each < len(names):
            found.append(each)
        else:
            quotes = f"; in quotes it is a name: '{each}'" if str(each) in names else ""
            raise ValueError(f"classes: there is no class {each!r} (there are {names_line(names)}){quotes}")
    return found
