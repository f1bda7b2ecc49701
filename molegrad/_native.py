"""Loads the native extension and says what it is.

Importing `molegrad._C` registers its kernels for the ops that molegrad/ops defines. It is
left alone where MOLEGRAD_BUILD=0 is in the environment, the variable that also makes an
installation skip compiling; every op then runs on its reference in molegrad/ops.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType

import torch


@functools.cache
def load() -> tuple[ModuleType | None, str | None]:
    """The extension module, or None and the reason why there is none.

    The first call decides for the process: kernels cannot be unregistered.
    """
    if os.environ.get("MOLEGRAD_BUILD") == "0":
        return None, "MOLEGRAD_BUILD=0 is set in the environment"
    try:
        return importlib.import_module("molegrad._C"), None
    except ModuleNotFoundError as error:
        if error.name != "molegrad._C":
            raise
        return (
            None,
            "the extension is not built: pip install -e . in the source directory builds it",
        )
    except ImportError as error:
        reason = (
            f"the extension was built but does not load beside torch {torch.__version__}: {error}. "
            "Build it again: pip install -e ."
        )
        warnings.warn(f"molegrad runs without its native kernels: {reason}", stacklevel=2)
        return None, reason


def build_info() -> dict:
    """What runs the ops: versions at build and at run time, instruction set, CUDA paths.

    Returns:
        "native" (bool) and "torch" (the running version) always. With the extension: "torch_built",
        "torch_abi_floor", "torch_abi", "compiler", "cpu_capability" (baseline, avx2 or avx512),
        "cuda" (bool), and "paths", which says for "kernels" (all of ours, on the GPU that is
        there), "fp8", "grouped" (several layers at once), "cublaslt_grouped" (the library's own
        way, not used) and "sketch" whether they are "supported" and the "reason". A CUDA build adds
        "cuda_built" and "cuda_found", and to "sketch" what MOLEGRAD_SKETCH_PATH has "wanted" and
        which path (own, cublaslt or fused) each dtype takes now where no rule of that variable
        means the layer. Without the extension: "reason".
    """
    module, reason = load()
    info = {"native": module is not None, "torch": torch.__version__}
    if module is None:
        return info | {"reason": reason}
    return info | module.build_info()
