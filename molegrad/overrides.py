"""Values of `MoleGradConfig` that say which layers they are for: targets, and ranks and shares of
single layers, written PATTERN=VALUE. Here they are checked and brought into one form."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

TARGET_GROUPS = ("ffn_only", "attention_only", "all")


def check_rank(name: str, rank: Any) -> None:
    """An integer >= 1, or a fraction strictly between 0 and 1."""
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        raise TypeError(f"{name} must be an integer or a fraction, got {rank!r}")
    if isinstance(rank, int) and rank < 1:
        raise ValueError(f"{name} must be at least 1, got {rank}")
    if isinstance(rank, float) and not 0.0 < rank < 1.0:
        raise ValueError(
            f"{name} must be an integer, or a fraction between 0 and 1 (a share of the layer's "
            f"smaller side), got {rank!r}"
        )


def check_share(name: str, share: Any) -> None:
    """A number above 0 and up to 1."""
    if isinstance(share, bool) or not isinstance(share, (int, float)):
        raise TypeError(f"{name} must be a number, got {share!r}")
    if not 0.0 < share <= 1.0:
        raise ValueError(
            f"{name} must be above 0 and at most 1 (0.25 takes a quarter of the products), "
            f"got {share!r}"
        )


def split_override(override: str, field: str = "rank_overrides") -> tuple[str, int | float]:
    """Pattern and value of "PATTERN=VALUE"; the pattern itself may hold a "="."""
    pattern, _, value = override.rpartition("=")
    try:
        if not pattern.strip():
            raise ValueError
        return pattern.strip(), int(value) if value.strip().isdigit() else float(value)
    except ValueError:
        raise ValueError(
            f"{field} has {override!r}, where PATTERN={_VALUE[field].upper()} is wanted, such as "
            "'attention=16' or 'c_proj=0.25'"
        ) from None


_VALUE = {"rank_overrides": "rank", "sample_overrides": "share"}


def normalized_overrides(
    name: str, overrides: Any, check: Callable[[str, Any], None]
) -> tuple[str, ...]:
    if isinstance(overrides, str):
        entries = tuple(part.strip() for part in overrides.split(",") if part.strip())
    elif isinstance(overrides, Sequence) and all(isinstance(o, str) for o in overrides):
        entries = tuple(overrides)
    else:
        raise TypeError(
            f"{name} must be a string such as 'attention=16,c_proj=0.25' or a list of such "
            f"entries, got {overrides!r}"
        )
    for entry in entries:
        pattern, value = split_override(entry, name)
        check(f"{name}: the {_VALUE[name]} of {pattern!r}", value)
        _check_pattern(name, pattern)
    return entries


def _check_pattern(field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{field} has {pattern!r}, which is no valid regular expression: {error}"
        ) from None


def normalized_targets(targets: Any) -> str | tuple[str, ...]:
    if targets == "all-linear":  # PEFT's name for the same choice
        return "all"
    if isinstance(targets, str):
        names = tuple(part.strip() for part in targets.split(",") if part.strip())
        if len(names) == 1 and names[0] in TARGET_GROUPS:
            return names[0]
    elif isinstance(targets, Sequence) and all(isinstance(t, str) for t in targets):
        names = tuple(targets)
    else:
        raise TypeError(
            "target_layers must be 'ffn_only', 'attention_only', 'all' or a list of module names "
            f"or patterns, got {targets!r}"
        )
    if not names:
        raise ValueError("target_layers is empty: name at least one layer or pattern, or a group")
    for name in names:
        if name in TARGET_GROUPS:
            raise ValueError(
                f"target_layers mixes the group {name!r} with names: give either one group "
                f"({', '.join(TARGET_GROUPS)}) or names and patterns only"
            )
        _check_pattern("target_layers", name)
    return names
