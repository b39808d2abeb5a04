"""What a YAML says of a method or a reward, kept as it is: it is built later, several times, with other values."""

from __future__ import annotations

from typing import Any

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


def plain(value: Any) -> Any:
    """The dictionary of a `Spec`; anything else as it is."""
    return value.value if isinstance(value, Spec) else value
