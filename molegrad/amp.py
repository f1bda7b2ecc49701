"""What autocast must leave alone: code that chooses the dtypes of its products itself."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def autocast_key(device_type: str) -> torch._C.DispatchKeySet:
    """The dispatch key by which autocast sees the ops of a device type ("cpu", "cuda")."""
    return torch._C.DispatchKeySet(torch._C._dispatch_key_parse(f"Autocast{device_type.upper()}"))


_AUTOCAST = autocast_key("cpu") | autocast_key("cuda")


def without_autocast(function: Callable) -> Callable:
    """`function` as it is outside of autocast. A backward pass that is started inside has autocast
    in its own thread too."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return function(*args, **kwargs)

    return run
