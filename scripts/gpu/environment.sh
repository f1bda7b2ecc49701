# Sourced by on-gpu.sh and train.sh in the project's root: where Python, packages, the extension and
# the logs are. `dry`: 1 where nothing is to be installed or built.
PYTHON=${PYTHON:-python3}
OUT=$(realpath -m "${OUT:-gpu-out}")
site=$PWD/.gpu/site
export OUT PYTHONUNBUFFERED=1 WANDB_MODE=offline PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$OUT"
if [ "$dry" = 0 ]; then
  export PYTHONPATH=$site:$PYTHONPATH MOLEGRAD_HOME=${MOLEGRAD_HOME:-$PWD/.gpu/home}
  if [ ! -d "$site" ] && ls .gpu/wheels/*.whl >/dev/null 2>&1; then
    "$PYTHON" -m pip install -q --no-index --no-deps --target "$site" .gpu/wheels/*.whl
  fi
  cp -n .gpu/_C*.so molegrad/ 2>/dev/null || true
  "$PYTHON" -c 'import molegrad, sys; sys.exit(not molegrad.build_info()["cuda"])' ||
    MOLEGRAD_CUDA=ON MOLEGRAD_CUDA_ARCHITECTURES=${MOLEGRAD_CUDA_ARCHITECTURES:-90a-real} \
      timeout 240 "$PYTHON" setup.py build_ext --inplace >"$OUT/build.log" 2>&1
fi
