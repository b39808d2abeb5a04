"""What an object is made of, as plain JSON: by it runs and results are told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from mfm_lightning.networks.files import weights_fingerprint

BUDGETS = ("max_rows",)  # settings that results do not depend on


def described(value: object, without: Sequence[str] = ()) -> Any:
    """A method, or what it is made of, as plain JSON: the class and its settings, with no address in memory; of a
    network the SHA-256 of its weights.

    Args:
        value: the method, or a part of it.
        without: names of settings that are left out.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): described(part, without) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [described(part, without) for part in value]
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    of = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, nn.Module):
        return {"class": of, "weights": weights_fingerprint(value)}
    fields = getattr(value, "__dict__", {}).items()
    settings = {name: described(part, without) for name, part in fields if name[0] != "_" and name not in without}
    return {"class": of, **settings}
