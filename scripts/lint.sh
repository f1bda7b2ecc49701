#!/usr/bin/env bash
# Style of Python, C++, CUDA and shell sources; "bash scripts/lint.sh --fix" mends what it can.

set -euo pipefail
export MOLEGRAD_EXTRAS="${MOLEGRAD_EXTRAS:-gpt,test,hf,peers}"
source "$(dirname "$0")/setup.sh"

sources=$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
if [ "${1:-}" = --fix ]; then
  "$PYTHON" -m ruff check --fix .
  "$PYTHON" -m ruff format .
  "$(dirname "$PYTHON")/clang-format" -i $sources
else
  "$PYTHON" -m ruff check .
  "$PYTHON" -m ruff format --check .
  "$(dirname "$PYTHON")/clang-format" --dry-run -Werror $sources
fi
for script in run10.sh scripts/*.sh .ci/run; do
  bash -n "$script"
done
echo "lint: no complaints"
