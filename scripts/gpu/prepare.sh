#!/usr/bin/env bash
# In the project's root, without a GPU: makes .gpu/ with all that a GPU machine without a network
# lacks. See README.md in this folder for the variables.
set -euo pipefail
python=${PYTHON:-python3.12}
venv=build/gpu-venv
mkdir -p build .gpu/wheels .gpu/text
[ -x $venv/bin/python ] || "$python" -m venv $venv
$venv/bin/pip install -q --disable-pip-version-check "torch==${MOLEGRAD_TORCH:-2.11.0}" numpy \
  "setuptools>=77" cmake ninja pybind11
# Built in a copy, so that an extension of another Python or torch stays in the checkout.
rm -rf build/gpu-source
mkdir build/gpu-source
git ls-files -z | xargs -0 cp --parents -t build/gpu-source
(cd build/gpu-source &&
  MOLEGRAD_CUDA=ON MOLEGRAD_CUDA_ARCHITECTURES=${MOLEGRAD_CUDA_ARCHITECTURES:-90a-real} \
    "$OLDPWD/$venv/bin/python" setup.py build_ext --inplace)
cp build/gpu-source/molegrad/_C*.so .gpu/
$venv/bin/pip download -q --no-deps --only-binary=:all: -d .gpu/wheels rustbpe
if [ -n "${MOLEGRAD_TEXT:-}" ]; then cp "$MOLEGRAD_TEXT"/{train,val}.txt .gpu/text/; fi
du -sh .gpu
