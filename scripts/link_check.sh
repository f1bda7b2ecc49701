#!/usr/bin/env bash
# Builds the whole extension beside a CUDA build of torch in an environment of its own, links it and
# imports it. Needs nvcc, no GPU; installs several GB below build/.
#
#   MOLEGRAD_CUDA_TORCH   the torch to link with (default torch==2.11.0, CUDA 13.0)

set -euo pipefail
cd "$(dirname "$0")/.."

venv=build/cuda-venv
if [ ! -x "$venv/bin/python" ]; then python3 -m venv "$venv"; fi
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" "${MOLEGRAD_CUDA_TORCH:-torch==2.11.0}" numpy "setuptools>=77" cmake ninja pybind11
rm -rf build/link && mkdir -p build/link
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t build/link
cd build/link
MOLEGRAD_CUDA=ON "../../$venv/bin/python" setup.py build_ext --inplace
"../../$venv/bin/python" - <<'PY'
import torch, molegrad
from molegrad.ops.registry import OPS

info = molegrad.build_info()
assert info["native"] and info["cuda"], info
has = torch._C._dispatch_has_kernel_for_dispatch_key
names = [n for n, op in OPS.items() if not op.composed]
missing = [n for n in names if not has(f"molegrad::{n}", "CUDA")]
print(f"linked with torch {torch.__version__}; CUDA kernels: {len(names) - len(missing)} of "
      f"{len(names)}" + (f", missing: {', '.join(missing)}" if missing else ""))
PY
