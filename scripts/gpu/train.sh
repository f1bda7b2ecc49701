#!/usr/bin/env bash
# On the GPU machine, in the project's root: one epoch of a text with several methods at once, whose
# losses compare. See README.md in this folder for the variables. --dry-run: on the CPU, tiny.
set -u
kit=$(cd "$(dirname "$0")" && pwd)
dry=0
if [ "${1:-}" = --dry-run ]; then dry=1 && shift; fi
source "$kit/environment.sh"
text=()
folder=${MOLEGRAD_TEXT:-.gpu/text}
if [ -s "$folder/train.txt" ]; then
  text=("--data=$folder/train.txt" "--val-data=$folder/val.txt")
fi
base=("${text[@]}" --tokenizer=gpu --eval-every=0 --sample-every=-1 --save-every=-2
  --dashboards=none --shadow-every=0 --compile=False)
if [ "$dry" = 1 ]; then
  vocab=512
  tokenizer=(--max-bytes=200000)
  limit=0 # none
  base+=(--data-max-bytes=200000 --device-type=cpu --depth=2 --aspect-ratio=32 --max-seq-len=32
    --device-batch-size=2 --total-batch-size=128 "--num-iterations=${ITERS:-2}" --eval-tokens=64 --threads=1)
else
  vocab=16384
  tokenizer=()
  limit=${LIMIT:-220}
  base+=(--depth=12 --max-seq-len=2048 --device-batch-size=16 --total-batch-size=65536
    "--num-iterations=${ITERS:-170}" --eval-tokens=393216 --log-every=10)
fi
# One micro-batch is no step here, so that lowrank is the tangent method; lowrank-grad is block
# power into weight.grad.
declare -A flags=(
  [dense]=""
  [exact]="--streaming_preset=exact"
  [balanced]="--streaming_preset=balanced"
  [lowrank]="--enable_streaming=True"
  [lowrank96]="--enable_streaming=True --streaming_rank_k=96"
  [lowrank-grad]="--streaming_preset=lowrank-grad"
)
methods=${METHODS:-dense exact lowrank-grad lowrank lowrank96}
if [ "$dry" = 1 ]; then methods=${METHODS:-dense exact}; fi
for name in $methods; do
  if [ -z "${flags[$name]+known}" ]; then
    echo "METHODS: $name is none of ${!flags[*]}" >&2
    exit 2
  fi
done
if ! CUDA_VISIBLE_DEVICES='' timeout "$limit" "$PYTHON" -m scripts.tok_train "${text[@]}" \
  "${tokenizer[@]}" --tokenizer=gpu "--vocab-size=$vocab" >"$OUT/tokenizer.log" 2>&1; then
  tail -n 5 "$OUT/tokenizer.log"
  exit 1
fi
pids=()
for name in $methods; do
  # shellcheck disable=SC2086  (flags are meant to be split)
  timeout "$limit" "$PYTHON" -m scripts.base_train "--run=gpu-$name" "${base[@]}" \
    ${flags[$name]} >"$OUT/train-$name.log" 2>&1 &
  pids+=($!)
  # The first tokenizes for all.
  if [ "${#pids[@]}" = 1 ]; then sleep $((dry ? 0 : 12)); fi
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=1; done
for name in $methods; do
  echo "--- $name: $(grep -a bpb "$OUT/train-$name.log" | tail -n 1 | cut -c 1-160)"
  tail -n 2 "$OUT/train-$name.log" | cut -c 1-200
done
exit $status
