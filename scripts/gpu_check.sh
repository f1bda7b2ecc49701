#!/usr/bin/env bash
# One GPU, one command: builds, runs every test that needs a GPU, measures ops and training steps,
# looks for memory errors, and writes gpu_check.json and gpu_check.md, the targets first. Needs no
# network where torch, pytest and the build tools are installed.
#
#   bash scripts/gpu_check.sh [FOLDER]     results go there (default: gpu_check); every part has a
#                                          limit of its own, 8 minutes in all after the build
#   QUICK=1 bash scripts/gpu_check.sh      the targets' shapes only, two or three minutes
#   FULL=1 bash scripts/gpu_check.sh       every row, compiled steps and memory too, ten times the
#                                          limits
#   MOLEGRAD_VENV=none bash scripts/gpu_check.sh    with the torch that is installed

set -euo pipefail
folder="$(realpath -m "${1:-gpu_check}")"
export MOLEGRAD_CUDA="${MOLEGRAD_CUDA:-ON}"
source "$(dirname "$0")/setup.sh"
mkdir -p "$folder"
status=0
patience=1

# NAME SECONDS COMMAND...: its output in FOLDER/NAME.log, what it took, and whether it failed or had
# to be stopped.
part() {
  local name="$1" limit=$(($2 * patience)) begun=$SECONDS code=0
  shift 2
  say "$name"
  timeout --kill-after=5 "$limit" "$@" >"$folder/$name.log" 2>&1 || code=$?
  tail -n 3 "$folder/$name.log" | cut -c 1-300
  echo "$name $code $((SECONDS - begun))" >>"$folder/parts.txt"
  if [ "$code" != 0 ]; then status=1; fi
}

# NAME REASON: a part that is not run.
without() {
  echo "$1: $2"
  echo "$2" >"$folder/$1.log"
  echo "$1 missing 0" >>"$folder/parts.txt"
}

# Shapes, tokens, ranks and bfloat16 are the benchmark's own for a GPU. The methods are one for each
# target of a training step: all linear layers, feed-forward layers only, modes only.
methods=balanced,balanced:target_layers=ffn_only,factored-tangent:target_layers=all
grad=(--seconds=14)
steps=(--depth=12 --batches=1x8192,16x2048 --steps=10 --methods=exact,$methods)
if [ "${QUICK:-0}" = 1 ]; then
  grad=(--shapes=1280x5120 --tokens=8192 --ranks=32 --seconds=5)
  steps=(--depth=12 --batches=1x8192 --steps=6 --methods=$methods)
elif [ "${FULL:-0}" = 1 ]; then
  patience=10
  grad=(--seconds=0)
  methods=exact,minimal,$methods
  steps=(--depth=12 --batches=1x8192,16x2048 --compile=both --steps=20 --methods=$methods)
fi

rm -f "$folder/parts.txt"
part tests 160 "$PYTHON" -m pytest tests/gpu
part grad 100 "$PYTHON" -m scripts.bench_grad --device=cuda "${grad[@]}" --json
part step 110 "$PYTHON" -m scripts.bench_step --device=cuda "${steps[@]}" --json
part ops_tests 40 "$PYTHON" -m pytest tests/test_ops.py tests/test_linear.py tests/optim
if [ "${QUICK:-0}" = 1 ]; then
  without sanitizer "left out by QUICK=1"
elif command -v compute-sanitizer >/dev/null 2>&1; then
  part sanitizer 50 compute-sanitizer --error-exitcode=9 \
    "$PYTHON" -m pytest tests/gpu -k "opcheck or (sampled and 2)" -p no:cacheprovider
else
  without sanitizer "no compute-sanitizer here"
fi
if [ "${FULL:-0}" = 1 ]; then
  part memory 60 "$PYTHON" -m scripts.bench_memory --device=cuda --cap-gib=32 --json
else
  without memory "left out without FULL=1: python -m scripts.bench_memory --device=cuda --cap-gib=32"
fi
"$PYTHON" -m scripts.gpu_report --folder="$folder"
exit "$status"
