#!/usr/bin/env bash
# On the GPU machine, in the project's root: tests and measurements, each with a limit and a log.
# See README.md in this folder for parts and variables. --dry-run: on the CPU, tiny.
set -u
kit=$(cd "$(dirname "$0")" && pwd)
dry=0
if [ "${1:-}" = --dry-run ]; then dry=1 && shift; fi
known="info tests grad step profile fp8 compiled memory"
parts=" ${*:-${known% memory}} "
for name in $parts; do
  if [[ " $known " != *" $name "* ]]; then
    echo "$name is no part: $known" >&2
    exit 2
  fi
done
source "$kit/environment.sh"
methods=${METHODS:-exact,balanced,balanced:target_layers=ffn_only,tangent:target_layers=all}
begun=$SECONDS
status=0
# NAME LIMIT COMMAND...: a part, its log and its last lines. SIGINT first: a benchmark then prints
# what it has.
part() {
  local name=$1 limit=$2 code=0
  shift 2
  [[ "$parts" == *" $name "* ]] || return 0
  if [ "$dry" = 1 ]; then limit=0; fi # none
  echo "##### $name at $((SECONDS - begun)) s"
  env --default-signal=INT timeout --signal=INT --kill-after=10 "$limit" "$@" \
    >"$OUT/$name.log" 2>&1 || code=$?
  echo "status $code"
  grep -v '^{' "$OUT/$name.log" | tail -n "${lines:-14}" | cut -c 1-230
  if [ "$code" != 0 ]; then status=1; fi
}
info='import json, torch, molegrad
print(torch.__version__, torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU")
print(json.dumps(molegrad.build_info(), indent=1))'
tests=(-m pytest tests/gpu --tb=short --show-capture=no -rf -p no:cacheprovider)
if [ "$dry" = 1 ]; then
  tiny=(--device=cpu --depth=2 --aspect-ratio=32 --vocab=300 --dtype=float32)
  tests+=(--collect-only -q)
  grad=(--device=cpu --shapes=24x16 --tokens=8 --ranks=2 --repeats=1 --depth=2)
  step=("${tiny[@]}" --batches=1x16 --steps=1)
  compiled=("${step[@]}" --compile=no --methods=exact) # compiling takes a minute
  memory=("${tiny[@]}" --lengths=16,32)
  profile=(1 16 3 --device=cpu --depth=2)
  fp8=(--device=cpu --shapes=32x64 --tokens=32)
  methods=${METHODS:-exact,tangent:rank=4:target_layers=all}
  memory+=(--methods=exact)
else
  if "$PYTHON" -c 'import xdist' 2>/dev/null; then tests+=(-n 7 --dist=worksteal); fi
  grad=(--device=cuda --seconds=8)
  step=(--device=cuda --depth=12 --batches=1x8192,16x2048 --steps=8)
  compiled=(--device=cuda --depth=12 --batches=1x8192 --compile=yes --steps=8 "--methods=$methods")
  memory=(--device=cuda --cap-gib=32)
  profile=(4 2048 14)
  fp8=()
fi
part info 30 "$PYTHON" -c "$info"
lines=40 part tests 110 "$PYTHON" "${tests[@]}"
lines=20 part grad 75 "$PYTHON" -m scripts.bench_grad "${grad[@]}" --json
lines=30 part step 75 "$PYTHON" -m scripts.bench_step "${step[@]}" "--methods=$methods" --json
lines=60 part profile 60 "$PYTHON" "$kit/profile_steps.py" "dense,$methods" "${profile[@]}"
part fp8 30 "$PYTHON" "$kit/fp8_products.py" "${fp8[@]}"
lines=20 part compiled 100 "$PYTHON" -m scripts.bench_step "${compiled[@]}" --json
# shellcheck disable=SC2086  (flags are meant to be split)
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True part memory 180 \
  "$PYTHON" -m scripts.bench_memory "${memory[@]}" ${MEMORY_FLAGS:-} --json
echo "##### end at $((SECONDS - begun)) s"
exit $status
