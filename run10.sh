#!/usr/bin/env bash
# The best ChatGPT that $10 can buy, from nothing to a chat, on whatever this machine is.
#
#   bash run10.sh                     everything; each command does what is left to do
#   bash run10.sh molegrad report     these stages alone, from their beginning
#   PROFILE=rtx5090 bash run10.sh     another profile than the one that fits this machine
#
# Stages: tokenizer dense molegrad sft eval report
#
#   PROFILE        cpu (a quarter of an hour on 2 cores), rtx5090 (the $10 run), smoke (seconds)
#   RUN            name of the run (default: the profile's); two models train, RUN-dense and RUN
#   BASELINE       0 leaves the dense baseline out
#   DATA           corpus: embedded, a file or folder of text, or climbmix:SHARDS (default: by profile)
#   BASE_FLAGS     further flags for both trainings, e.g. "--num-iterations=20"
#   SFT_FLAGS      further flags for fine-tuning, e.g. "--num-iterations=50"
#   MOLEGRAD_FLAGS further flags for the MoleGrad training, e.g. "--streaming_sampling_fraction=0.5"
#   MOLEGRAD_HOME  where everything is written (default ~/.cache/molegrad)
#   MOLEGRAD_VENV, MOLEGRAD_TORCH, MOLEGRAD_BUILD, MOLEGRAD_CUDA: see scripts/setup.sh
#
# Every command that is run is shown, so that it can be copied, changed and run by hand. With
# --if-needed a command knows by itself whether it is done: it does nothing where it has ended with
# the same flags and data, goes on where it was interrupted, and starts over where anything differs.

source "$(dirname "$0")/scripts/setup.sh"

# ---------------------------------------------------------------------------------------------
# The profile: sizes, tokens and learning rates for one kind of machine.

gpu="$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 || true)"
if [ -n "$gpu" ] && ! "$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
  echo "There is a GPU ($gpu), but the torch that is installed cannot use it: going on without it."
  echo "For CUDA 12.8, install torch==2.10.0 in $PYTHON and run again."
  gpu=""
fi
PROFILE="${PROFILE:-$([ -n "$gpu" ] && echo rtx5090 || echo cpu)}"
RUN="${RUN:-$PROFILE}"
BASELINE="${BASELINE:-1}"
MOLEGRAD_HOME="${MOLEGRAD_HOME:-$HOME/.cache/molegrad}"
export MOLEGRAD_HOME

case "$PROFILE" in
  cpu) # two cores, a quarter of an hour, the corpus that comes with the installed packages
    DATA="${DATA:-embedded}"
    tok="--vocab-size=4096"
    base="--depth=4 --max-seq-len=256 --device-batch-size=8 --num-iterations=420 --matrix-lr=0.02"
    base+=" --eval-every=100 --eval-tokens=131072 --log-every=10 --sample-every=0"
    estimate="--streaming_preset=balanced"
    sft="--num-iterations=120 --eval-every=40"
    evaluation=""
    ;;
  rtx5090) # one 32 GB card, about $10: depth 12 at a context of 8192, device batch 1
    DATA="${DATA:-climbmix:20}"
    tok="--vocab-size=32768"
    base="--depth=12 --max-seq-len=8192 --device-batch-size=1 --total-batch-size=524288"
    base+=" --target-param-data-ratio=8 --matrix-lr=0.02 --eval-every=250 --save-every=250"
    # Sampling has not been measured on a GPU yet: all products, no gradient buffer, inputs in float8.
    estimate="--streaming_preset=exact --streaming_momentum_dtype=bfloat16"
    sft="--num-iterations=400 --eval-every=100"
    evaluation=""
    ;;
  smoke) # the shortest way through every stage; used by the tests
    DATA="${DATA:-embedded}"
    tok="--vocab-size=512 --max-chars=200000"
    base="--depth=2 --aspect-ratio=32 --max-seq-len=64 --device-batch-size=4 --num-iterations=12"
    base+=" --data-max-bytes=400000 --eval-every=6 --eval-tokens=2048 --matrix-lr=0.02"
    estimate="--streaming_preset=balanced"
    sft="--num-iterations=6 --eval-every=3"
    evaluation="--max-questions=8"
    ;;
  *)
    echo "PROFILE=$PROFILE is unknown: choose cpu, rtx5090 or smoke" >&2
    exit 2
    ;;
esac
base+=" --data=$DATA ${BASE_FLAGS:-}"
estimate+=" ${MOLEGRAD_FLAGS:-}"
sft+=" ${SFT_FLAGS:-}"

say "Profile $PROFILE${gpu:+ on $gpu}, run $RUN, everything under $MOLEGRAD_HOME"
if [ "$PROFILE" = rtx5090 ]; then
  "$PYTHON" -m scripts.budget $base $estimate --runs=$((1 + BASELINE))
fi

# ---------------------------------------------------------------------------------------------
# Stages: all of them, as far as they are left to do, or those named on the command
# line, from their beginning.

all="tokenizer dense molegrad sft eval report"
stages="${*:-$all}"
for stage in $stages; do
  if [[ " $all " != *" $stage "* ]]; then
    echo "unknown stage $stage: choose among $all" >&2
    exit 2
  fi
done
check="" train="--overwrite=True"
if [ $# = 0 ]; then check="--if-needed=True" train="--if-needed=True"; fi

# run STAGE COMMAND FLAGS...: one command of the pipeline, where its stage is wanted
run() {
  local stage="$1" command="$2"
  shift 2
  if [[ " $stages " != *" $stage "* ]]; then return; fi
  say "$stage: python -m scripts.$command $*"
  "$PYTHON" -m "scripts.$command" "$@"
}

started=$SECONDS
# shellcheck disable=SC2086  (flags are meant to be split)
{
  # The tokenizer, learnt from the corpus.
  run tokenizer tok_train --data="$DATA" $tok $check

  # The baseline: exact gradients, the same data, seed and learning rates.
  runs="$RUN"
  if [ "$BASELINE" = 1 ]; then
    runs="$RUN-dense,$RUN"
    run dense base_train --run="$RUN-dense" $base $train
    run eval base_eval --run="$RUN-dense" $evaluation $check
  fi

  # The same training with estimated gradients.
  run molegrad base_train --run="$RUN" $base $estimate $train
  run eval base_eval --run="$RUN" $evaluation $check

  # Fine-tuning on conversations makes a chat of it.
  run sft chat_sft --run="$RUN" $sft $estimate $train
  run eval chat_eval --run="$RUN" $evaluation $check

  # What came out, side by side.
  run report report --runs="$runs"
}

say "Done in $((SECONDS - started)) s. To chat with the model:"
home=""
if [ "$MOLEGRAD_HOME" != "$HOME/.cache/molegrad" ]; then home="MOLEGRAD_HOME=$MOLEGRAD_HOME "; fi
echo "$home$PYTHON -m scripts.chat_cli --run=$RUN"
