"""What a YAML says of a method or a reward, kept as it is: it is built later, several times, with other values."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse.typing import register_type


class Spec:
    """A dictionary that the parser of the suite's settings does not look into."""

    def __init__(self, value: dict[str, Any]) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"expected a dictionary, got {value!r}")
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)


register_type(Spec, serializer=lambda spec: spec.value, deserializer=Spec)


def build(kind: type, settings: dict[str, Any], what: str) -> Any:
    """An object of a subclass of `kind` from its `class_path` and `init_args`.

    Raises:
        ValueError: if the settings do not fit the class; `what` says of which thing.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "built", required=True)
    try:
        return parser.instantiate(parser.parse_object({"built": settings})).built
    except (ArgumentError, TypeError) as error:
        raise ValueError(f"{what} cannot be built: {error}") from error


def plain(value: Any) -> Any:
    """The dictionary of a `Spec`; anything else as it is."""
    return value.value if isinstance(value, Spec) else value
