"""Options: frozen dataclasses whose fields carry their help text and are validated once.

The command line's `--streaming_<field>` flags are generated from such fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


def option(default: Any, help: str) -> Any:
    """A dataclass field with its help text in `metadata["help"]`."""
    return dataclasses.field(default=default, metadata={"help": help})


class Options:
    """Checks of single fields, for `__post_init__`; each error names field, value and remedy."""

    def _require_int(self, name: str, minimum: int, maximum: int = 2**31 - 1) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if not minimum <= value <= maximum:
            bound = f"at least {minimum}" if value < minimum else f"at most {maximum}"
            raise ValueError(f"{name} must be {bound}, got {value}")

    def _require_number(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not low <= value <= high:
            raise ValueError(f"{name} must lie between {low:g} and {high:g}, got {value!r}")

    def _require_choice(self, name: str, choices: Sequence[str]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")

    def _require_bool(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def plain_values(options: Any) -> dict[str, Any]:
    """The fields of a dataclass, tuples as lists, so that JSON holds them."""
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
