"""What a sample is conditioned on besides its noisy state: one value, made at the top of a call and passed on whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Index = slice | Tensor
Batch = tuple[Tensor, Tensor | Mapping[str, Any]]  # x1, and labels or a dictionary of conditions
INDEX = "index"  # which samples of the data they are, `(B,)`: in a batch's dictionary, but no condition


@dataclass(frozen=True, eq=False, init=False)
class Conditions:
    """Class labels or text embeddings, the guidance scale, and the prompts that a reward reads, a row each sample.

    A field of one row stands for all samples, until `expand` gives each its own. A field that is None is not there: the
    network takes its null condition instead (`null_conditions`).

    Args:
        label: class labels `(B,)`, or a number for all; a network's `num_classes` is its null label.
        guidance: guidance scale fed to the network, `(B,)`, or a number for all; 1 is none.
        text: embeddings of the prompts' tokens, `(B, L, D)`.
        mask: which of the tokens are there, `(B, L)`.
        pooled: one embedding a prompt, `(B, P)`.
        prompts: B texts, or one for all. Rewards read them; networks only where they embed them themselves.
        group: `(B,)` integers, or one for all: samples of equal ones are scored beside each other, by rewards that need
            groups. The states of one sample are in its group.
        negative_text: `text` of a negative prompt, which guidance by two evaluations leads away from (text-to-image
            flows).
        negative_mask: `mask` of the negative prompt.
        negative_pooled: `pooled` of the negative prompt.

    Raises:
        ValueError: for labels that are not integers, a field with another number of dimensions, or fields of different
            numbers of rows.
    """

    label: Tensor | None
    guidance: Tensor | None
    text: Tensor | None
    mask: Tensor | None
    pooled: Tensor | None
    prompts: tuple[str, ...] | None
    group: Tensor | None
    negative_text: Tensor | None
    negative_mask: Tensor | None
    negative_pooled: Tensor | None

    def __init__(
        self,
        label: Tensor | int | None = None,
        guidance: Tensor | float | None = None,
        text: Tensor | None = None,
        mask: Tensor | None = None,
        pooled: Tensor | None = None,
        prompts: Sequence[str] | str | None = None,
        negative_text: Tensor | None = None,
        negative_mask: Tensor | None = None,
        negative_pooled: Tensor | None = None,
        group: Tensor | int | None = None,
    ) -> None:
        values = {
            "label": None if label is None else _integers("labels", torch.atleast_1d(torch.as_tensor(label))),
            "guidance": None if guidance is None else torch.atleast_1d(torch.as_tensor(guidance)),
            "text": text,
            "mask": mask,
            "pooled": pooled,
            "prompts": (prompts,) if isinstance(prompts, str) else None if prompts is None else tuple(prompts),
            "group": None if group is None else _integers("groups", torch.atleast_1d(torch.as_tensor(group))),
            "negative_text": negative_text,
            "negative_mask": negative_mask,
            "negative_pooled": negative_pooled,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        for name, value in self._tensors().items():
            if value.dim() != _DIMENSIONS[name]:
                raise ValueError(f"conditions: {name} of shape {tuple(value.shape)}, expected {_SHAPES[name]}")
        rows = {name: len(value) for name, value in self._values().items() if len(value) != 1}
        if len(set(rows.values())) > 1:
            raise ValueError(f"conditions of different numbers of rows: {rows}; expected the same, or one for all")

    # -- making them ---------------------------------------------------------------------------------------------------

    @classmethod
    def of(
        cls,
        conditions: Conditions | None = None,
        *,
        label: Tensor | int | None = None,
        guidance: Tensor | float | None = None,
        prompts: Sequence[str] | str | None = None,
    ) -> Conditions:
        """The conditions of a call that takes them whole, or some of them by keyword.

        Raises:
            ValueError: if one of them is given both ways.
            TypeError: for conditions of another type.
        """
        if conditions is not None and not isinstance(conditions, Conditions):
            raise TypeError(f"conditions are a {type(conditions).__name__}: expected Conditions; label= takes labels")
        given = {"label": label, "guidance": guidance, "prompts": prompts}
        given = {name: value for name, value in given.items() if value is not None}
        if conditions is None:
            return cls(**given)
        if twice := [name for name in given if getattr(conditions, name) is not None]:
            raise ValueError(f"{twice[0]} is given twice: in conditions, and as {twice[0]}=")
        return replace(conditions, **given) if given else conditions

    @classmethod
    def of_batch(cls, given: Conditions | Tensor | Mapping[str, Any] | None, num: int | None = None) -> Conditions:
        """The conditions of a batch `(x1, given)`: labels `(B,)`, or a dictionary of fields by their names. The
        samples' `index` may be there, too, and is left out.

        Args:
            given: labels, fields by name, or conditions already.
            num: B, where each field must have so many rows.

        Raises:
            ValueError: for a field that is not one of these, anything else, or another number of rows.
        """
        found = cls._of_batch(given)
        for name, value in found._values().items():
            if num is not None and len(value) != num:
                raise ValueError(f"{len(value)} rows of {name} in a batch of {num}")
        return found

    @classmethod
    def _of_batch(cls, given: Conditions | Tensor | Mapping[str, Any] | None) -> Conditions:
        if given is None or isinstance(given, Conditions):
            return given or cls()
        if isinstance(given, Tensor):
            return cls(label=given)
        known = [field.name for field in fields(cls)]
        if isinstance(given, Mapping):
            given = {name: value for name, value in given.items() if name != INDEX}
        names = list(given) if isinstance(given, Mapping) else [type(given).__name__]
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"the conditions of a batch: got {unknown[0]}, expected labels (B,), or some of {known}")
        return cls(**given)

    def as_batch(self) -> Tensor | dict[str, Any]:
        """What `of_batch` takes: labels, or a dictionary where there is more or nothing."""
        values = self._values()
        if list(values) == ["label"] and isinstance(self.label, Tensor):
            return self.label
        return {name: list(value) if name == "prompts" else value for name, value in values.items()}

    # -- rows ----------------------------------------------------------------------------------------------------------

    def expand(self, num: int, device: torch.device | str | None = None) -> Conditions:
        """A row for each of `num` states, on a device; rows of B samples go to `num // B` states each, those of one
        sample next to each other. What is so already comes back as it is.

        Raises:
            ValueError: if `num` is no multiple of the number of rows.
        """

        def rows(name: str, value: Tensor | tuple[str, ...]) -> Tensor | tuple[str, ...]:
            if not len(value) or num % len(value):
                raise ValueError(
                    f"{num} states for {len(value)} rows of {name}: expected the same number or a multiple"
                )
            return _repeated(value, num // len(value))

        done = self._map(lambda name, value: value if len(value) == num else rows(name, value))
        return done if device is None else done.to(device)

    def take(self, index: Index) -> Conditions:
        """The rows of some samples; a field of one row, which stands for all, stays."""

        def rows(_: str, value: Tensor | tuple[str, ...]) -> Tensor | tuple[str, ...]:
            if len(value) == 1:
                return value
            if isinstance(value, Tensor):
                return value[index.to(value.device) if isinstance(index, Tensor) else index]
            return tuple(value[i] for i in torch.arange(len(value))[_on_cpu(index)].tolist())

        return self._map(rows)

    def cat(self, other: Conditions) -> Conditions:
        """The rows of both, which are expanded.

        Raises:
            ValueError: if they have not the same fields.
        """
        ours, theirs = list(self._values()), list(other._values())
        if ours != theirs:
            raise ValueError(f"conditions of different fields cannot be joined: {ours} and {theirs}")
        return self._map(lambda name, value: _joined(value, getattr(other, name)))

    def to(self, device: torch.device | str) -> Conditions:
        """On a device."""
        device = torch.device(device)
        return self._map(lambda _, value: value if isinstance(value, tuple) else value.to(device))

    # -- the null condition --------------------------------------------------------------------------------------------

    def drop(self, where: Tensor, null: Conditions) -> Conditions:
        """The null condition, without guidance and prompt, in the rows `where` `(B,)` is true.

        Args:
            where: `(B,)` booleans.
            null: of the network, one row.

        Raises:
            ValueError: if the embeddings of null and sample have different shapes.
        """

        def dropped(name: str, value: Tensor | tuple[str, ...]) -> Tensor | tuple[str, ...]:
            if name.startswith("negative") or name == "group":
                return value  # without guidance nothing leads away from it; a group is no condition of the network
            if isinstance(value, tuple):
                return tuple("" if drop else text for drop, text in zip(where.tolist(), value, strict=True))
            nothing = torch.ones_like(value[:1]) if name == "guidance" else getattr(null, name)
            if nothing is None or nothing.shape[1:] != value.shape[1:]:
                shape = None if nothing is None else tuple(nothing.shape)
                raise ValueError(f"null condition: {name} of shape {shape} for rows of {tuple(value.shape)}")
            return torch.where(where.reshape(-1, *[1] * (value.dim() - 1)), nothing.to(value), value)

        return self.expand(len(where), where.device)._map(dropped)

    def is_null(self, null: Conditions) -> Tensor:
        """Which rows `(B,)` are the network's null condition; guidance and prompts do not count."""
        found = None
        for name, value in self._tensors().items():
            if name != "guidance" and getattr(null, name) is not None:
                same = (value == getattr(null, name).to(value)).reshape(len(value), -1).all(dim=1)
                found = same if found is None else found & same
        return torch.ones(1, dtype=torch.bool) if found is None else found

    def filled(self, null: Conditions) -> Conditions:
        """With the null condition's fields, of one row, where these have none."""
        missing = {name: value for name, value in null._tensors().items() if getattr(self, name) is None}
        return replace(self, **missing) if missing else self

    # -- machinery -----------------------------------------------------------------------------------------------------

    @property
    def negative(self) -> Conditions:
        """The negative prompt's embeddings as the condition of an evaluation of its own, with the same guidance."""
        return Conditions(
            guidance=self.guidance, text=self.negative_text, mask=self.negative_mask, pooled=self.negative_pooled
        )

    @property
    def num_rows(self) -> int:
        """The number of samples that the fields distinguish; 1 where all stand for all."""
        return max((len(value) for value in self._values().values()), default=1)

    def _values(self) -> dict[str, Any]:
        return {name: value for name in _NAMES if (value := getattr(self, name)) is not None}

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self._values().items() if name != "prompts"}

    def _map(self, function: Callable[[str, Any], Any]) -> Conditions:
        """Each field that is there, by `function(name, value)`; the same object where nothing changes."""
        values = self._values()
        found = {name: function(name, value) for name, value in values.items()}
        return self if all(found[name] is values[name] for name in values) else _made(found)


def unlabelled(batch: Any) -> Any:
    """A batch without its labels, for a network that has no classes; what is no batch comes back as it is."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        return batch
    x1, given = batch
    index = {INDEX: given[INDEX]} if isinstance(given, Mapping) and INDEX in given else {}
    rest = replace(Conditions.of_batch(given), label=None).as_batch()
    return x1, {**rest, **index} if isinstance(rest, Mapping) else rest


_SHAPES = {
    "label": "(B,)",
    "group": "(B,)",
    "guidance": "(B,)",
    "text": "(B, L, D)",
    "mask": "(B, L)",
    "pooled": "(B, P)",
}
_SHAPES |= {f"negative_{name}": _SHAPES[name] for name in ("text", "mask", "pooled")}
_DIMENSIONS = {name: shape.count(",") + (shape != "(B,)") for name, shape in _SHAPES.items()}
_NAMES = tuple(field.name for field in fields(Conditions))


def _integers(what: str, label: Tensor) -> Tensor:
    if label.is_floating_point() or label.is_complex():
        raise ValueError(f"{what} of type {label.dtype}: expected integers")
    return label.long()  # in a smaller type a null label may not fit


def _repeated(value: Tensor | tuple[str, ...], times: int) -> Tensor | tuple[str, ...]:
    if isinstance(value, Tensor):
        return value.repeat_interleave(times, dim=0)
    return tuple(text for text in value for _ in range(times))


def _joined(a: Any, b: Any) -> Tensor | tuple[str, ...]:
    return torch.cat([a, b]) if isinstance(a, Tensor) else (*a, *b)


def _on_cpu(index: Index) -> Index:
    return index.cpu() if isinstance(index, Tensor) else index


def _made(values: Mapping[str, Any]) -> Conditions:
    """Without checks: what a transformation of tensors puts into the fields may be no tensors."""
    made = object.__new__(Conditions)
    for name in _NAMES:
        object.__setattr__(made, name, values.get(name))
    return made


def _flatten(conditions: Conditions) -> tuple[list[Tensor], tuple[tuple[str, ...], Any]]:
    tensors = conditions._tensors()
    return list(tensors.values()), (tuple(tensors), conditions.prompts)


def _unflatten(tensors: Any, context: tuple[tuple[str, ...], Any]) -> Conditions:
    names, prompts = context
    return _made({**dict(zip(names, tensors, strict=True)), "prompts": prompts})


# batch transfer, FSDP's casts, torch.func and torch.compile see the tensors inside
pytree.register_pytree_node(Conditions, _flatten, _unflatten, serialized_type_name="mfm_lightning.Conditions")
