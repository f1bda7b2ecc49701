#!/usr/bin/env bash
# Sets up the environment, builds the extension and runs the whole test suite.
#
#   bash scripts/test.sh                    everything
#   bash scripts/test.sh tests/optim -x     arguments go to pytest
#   MOLEGRAD_BUILD=0 bash scripts/test.sh   the same suite on the plain torch fallback

set -euo pipefail
export MOLEGRAD_EXTRAS="${MOLEGRAD_EXTRAS:-gpt,test,hf,peers}"
source "$(dirname "$0")/setup.sh"

workers="$(nproc)"
if [ "$workers" -gt 8 ]; then workers=8; fi
say "Running the tests on $workers workers"
export WANDB_MODE="${WANDB_MODE:-offline}" OMP_NUM_THREADS=1
exec "$PYTHON" -m pytest -n "$workers" "$@"
