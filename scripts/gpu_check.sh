#!/usr/bin/env bash
# One GPU, one command: builds, runs every test that needs a GPU, measures ops and training steps,
# looks for memory errors, and writes gpu_check.json and gpu_check.md, the targets first.
#
#   bash scripts/gpu_check.sh [FOLDER]     results go there (default: gpu_check); every part has a
#                                          limit of its own, 8 minutes in all after the build
#   QUICK=1 bash scripts/gpu_check.sh      the targets' shapes only, two or three minutes
#   FULL=1 bash scripts/gpu_check.sh       every row, compiled steps and memory too, ten times the
#                                          limits
#   PARTS="grad step" bash scripts/gpu_check.sh    these alone; FOLDER keeps what it has of others
#   MEMORY_FLAGS=...                       further flags of the part memory (scripts.bench_memory)
#   MOLEGRAD_VENV=none MOLEGRAD_DEPS=0 bash scripts/gpu_check.sh    with what is installed and no
#                                          network; see scripts/setup.sh
#
# Parts: tests grad step compiled sanitizer memory. One that is out of time is told to stop as by
# Ctrl-C: benchmarks then print what they have. Ctrl-C ends the part at hand and leaves out the rest.
# Kernels are built for the GPU that is here, unless MOLEGRAD_CUDA_ARCHITECTURES names others.

set -euo pipefail
folder="$(realpath -m "${1:-gpu_check}")"
export MOLEGRAD_CUDA="${MOLEGRAD_CUDA:-ON}" PYTHONUNBUFFERED=1
if [ -z "${MOLEGRAD_CUDA_ARCHITECTURES:-}" ]; then
  capability="$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null || true)"
  capability="${capability%%$'\n'*}"
  case "$capability" in
    9.0) export MOLEGRAD_CUDA_ARCHITECTURES=90a-real ;;
    [0-9]*.[0-9]) export MOLEGRAD_CUDA_ARCHITECTURES="${capability/./}-real" ;;
  esac
fi
source "$(dirname "$0")/setup.sh"
mkdir -p "$folder"
status=0
patience=1
stopped=0
running=""
stop() {
  stopped=1
  if [ -n "$running" ]; then kill -INT "$running" 2>/dev/null || true; fi
}
trap stop INT TERM

PARTS=" ${PARTS:-} "
for name in $PARTS; do
  case "$name" in
    tests | grad | step | compiled | sanitizer | memory) ;;
    *)
      echo "PARTS: $name is unknown: tests grad step compiled sanitizer memory" >&2
      exit 2
      ;;
  esac
done

# What a shell starts in the background ignores SIGINT where nothing is done about it.
interruptible=()
if env --default-signal=INT true 2>/dev/null; then interruptible=(env --default-signal=INT); fi

# NAME: whether it is to be run.
wanted() { [ "$PARTS" = "  " ] || [[ "$PARTS" == *" $1 "* ]]; }

# NAME STATUS SECONDS: what became of a part, in place of what there was.
note() {
  touch "$folder/parts.txt"
  sed -i "/^$1 /d" "$folder/parts.txt"
  echo "$1 $2 $3" >>"$folder/parts.txt"
}

# NAME SECONDS COMMAND...: its output in FOLDER/NAME.log, what it took, and whether it failed or had
# to be stopped.
part() {
  local name="$1" limit=$(($2 * patience)) begun=$SECONDS code=0
  shift 2
  if ! wanted "$name"; then return; fi
  if [ "$stopped" = 1 ]; then without "$name" "left out after Ctrl-C" && return; fi
  say "$name"
  "${interruptible[@]}" timeout --signal=INT --kill-after=20 "$limit" "$@" \
    >"$folder/$name.log" 2>&1 &
  running=$!
  wait "$running" || code=$?
  if [ "$stopped" = 1 ]; then # the signal has ended the waiting, and not yet the part
    code=0
    wait "$running" || code=$?
  fi
  running=""
  tail -n 3 "$folder/$name.log" | cut -c 1-300
  note "$name" "$code" $((SECONDS - begun))
  if [ "$code" != 0 ]; then status=1; fi
}

# NAME REASON: a part that is not run.
without() {
  if ! wanted "$1"; then return; fi
  echo "$1: $2"
  echo "$2" >"$folder/$1.log"
  note "$1" missing 0
}

# Shapes, tokens, ranks and bfloat16 are the benchmark's own for a GPU. The methods are one for each
# target of a training step: all linear layers, feed-forward layers only, modes only.
methods=balanced,balanced:target_layers=ffn_only,tangent:target_layers=all
grad=(--seconds=11)
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

# Processes side by side, which share the GPU: most of a test's time is the host's. One whose GPU
# context a kernel has broken is replaced.
workers="$(nproc)"
if [ "$workers" -gt 8 ]; then workers=8; fi
tests=("$PYTHON" -m pytest tests/gpu --tb=short --show-capture=no -rf)
if "$PYTHON" -c 'import xdist' 2>/dev/null; then
  tests+=(-n "$workers" --dist=worksteal)
  limit=90
else
  echo "no pytest-xdist here: the tests run one by one, which takes minutes more"
  limit=300
fi

if [ "$PARTS" = "  " ]; then rm -f "$folder/parts.txt"; fi
part tests "$limit" "${tests[@]}"
part grad 90 "$PYTHON" -m scripts.bench_grad --device=cuda "${grad[@]}" --json
part step 90 "$PYTHON" -m scripts.bench_step --device=cuda "${steps[@]}" --json
if [[ "${QUICK:-0}${FULL:-0}" == *1* && "$PARTS" != *" compiled "* ]]; then
  without compiled "left out by QUICK=1; FULL=1 compiles in the part step"
else
  part compiled 90 "$PYTHON" -m scripts.bench_step --device=cuda --depth=12 --batches=1x8192 \
    --compile=yes --steps=6 --methods=balanced --json
fi
if [[ "${QUICK:-0}" == 1 && "$PARTS" != *" sanitizer "* ]]; then
  without sanitizer "left out by QUICK=1"
elif command -v compute-sanitizer >/dev/null 2>&1; then
  # Without torch's cache every tensor is an allocation of its own, whose ends can be seen.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 part sanitizer 120 compute-sanitizer --error-exitcode=9 \
    "$PYTHON" -m pytest tests/gpu/test_cuda.py -k test_every_op_runs -p no:cacheprovider
else
  without sanitizer "no compute-sanitizer here"
fi
if [[ "${FULL:-0}" == 1 || "$PARTS" == *" memory "* ]]; then
  # shellcheck disable=SC2086  (flags are meant to be split)
  PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True part memory 180 \
    "$PYTHON" -m scripts.bench_memory --device=cuda --cap-gib=32 ${MEMORY_FLAGS:-} --json
else
  without memory "left out without FULL=1 or PARTS=memory"
fi
"$PYTHON" -m scripts.gpu_report --folder="$folder"
exit $((status | stopped))
