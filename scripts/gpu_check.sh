#!/usr/bin/env bash
# One GPU, one command: builds, runs every test that needs a GPU, looks for memory errors, measures
# ops and training steps, and writes gpu_check.json and gpu_check.md. Needs no network where torch,
# pytest and the build tools are installed.
#
#   bash scripts/gpu_check.sh [FOLDER]     results go there (default: gpu_check)
#   MOLEGRAD_VENV=none bash scripts/gpu_check.sh    with the torch that is installed
#   QUICK=1 bash scripts/gpu_check.sh      small shapes and a small model, a minute or two

set -euo pipefail
folder="$(realpath -m "${1:-gpu_check}")"
export MOLEGRAD_CUDA="${MOLEGRAD_CUDA:-ON}"
source "$(dirname "$0")/setup.sh"
mkdir -p "$folder"
status=0

# NAME COMMAND...: its output in FOLDER/NAME.log, what it took, and whether it failed.
part() {
  local name="$1" begun=$SECONDS code=0
  shift
  say "$name"
  "$@" >"$folder/$name.log" 2>&1 || code=$?
  tail -n 3 "$folder/$name.log" | cut -c 1-300
  echo "$name $code $((SECONDS - begun))" >>"$folder/parts.txt"
  if [ "$code" != 0 ]; then status=1; fi
}

if [ "${QUICK:-0}" = 1 ]; then
  grad=(--shapes=768x3072 --tokens=2048 --ranks=32 --repeats=5)
  steps=(--depth=4 --batches=1x2048 --steps=8)
else
  grad=(--shapes=768x3072,1280x5120,4096x14336 --tokens=2048,8192,32768 --ranks=32,64,128)
  steps=(--depth=12 --batches=1x8192,16x2048 --compile=both --steps=12)
fi

rm -f "$folder/parts.txt"
part tests "$PYTHON" -m pytest -q tests/gpu
part ops_tests "$PYTHON" -m pytest -q tests/test_ops.py tests/test_linear.py tests/optim
if command -v compute-sanitizer >/dev/null 2>&1; then
  part sanitizer compute-sanitizer --error-exitcode=9 \
    "$PYTHON" -m pytest -q tests/gpu -k "opcheck or (sampled and 2)" -p no:cacheprovider
else
  echo "sanitizer: no compute-sanitizer here"
  echo "sanitizer missing 0" >>"$folder/parts.txt"
fi
part grad "$PYTHON" -m scripts.bench_grad --device=cuda --dtype=bfloat16 "${grad[@]}" --json
part step "$PYTHON" -m scripts.bench_step --device=cuda "${steps[@]}" --json
"$PYTHON" -m scripts.gpu_report --folder="$folder"
exit "$status"
