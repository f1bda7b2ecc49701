"""The native extension: loading it once, and telling what was loaded.

`import molegrad` imports `molegrad._C`, which registers the native kernels of torch.ops.molegrad,
unless MOLEGRAD_BUILD=0 stands in the environment or the extension is not built; the torch
reference then serves.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any


def load() -> tuple[ModuleType | None, str]:
    """The extension module, or None and the reason why there is none.

    Raises:
        ImportError: the extension is built but cannot be loaded (another torch, say).
    """
    if os.environ.get("MOLEGRAD_BUILD") == "0":
        return None, "MOLEGRAD_BUILD=0 is set"
    try:
        return importlib.import_module("molegrad._C"), ""
    except ModuleNotFoundError:
        return None, "the extension is not built: run 'pip install -e .' in the source folder"


def build_info() -> dict[str, Any]:
    """Versions, architectures and paths of the native build; `native` False and why without one."""
    module, reason = load()
    if module is None:
        return {"native": False, "reason": reason}
    return {"native": True, **module.build_info()}
