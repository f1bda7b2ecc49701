"""What autocast and TF32 must leave alone: code that chooses the precision of its products."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

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


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Products of float32 matrices in float32, neither in autocast's dtype nor in TF32."""
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
