# Prepares the Python environment. Source it: it leaves PYTHON set to the interpreter to use.
#
#   MOLEGRAD_VENV   folder of the virtual environment (default .venv here); "none" uses $PYTHON or
#                   python3 as it is, with --no-build-isolation, for machines that bring torch along
#   MOLEGRAD_TORCH  what pip installs as torch where there is none (default: the newest release
#                   built for CUDA 12.8 beside an NVIDIA GPU, otherwise torch==2.13.0)
#   MOLEGRAD_BUILD  0 leaves the native extension out (see README)
#   MOLEGRAD_DEPS   0 installs MoleGrad without what it depends on, with no network; what its commands
#                   need and is not there is named, and is an error
#   MOLEGRAD_EXTRAS  what pip installs beside: "gpt" for the pipeline (default), and for all tests
#                   "gpt,test,hf,peers"
#   MOLEGRAD_SKIP_INSTALL  1 takes the environment as it is

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.10; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "MoleGrad needs Python 3.10 or newer (on Debian: apt-get install python3 python3-venv)" >&2
  return 1
}

setup_environment() {
  local venv="${MOLEGRAD_VENV:-.venv}" extras="${MOLEGRAD_EXTRAS:-gpt}" isolation=() stamp
  PYTHON="$(find_python)"
  if [ "$venv" = none ]; then
    isolation=(--no-build-isolation)
    stamp="$("$PYTHON" -c 'import sys; print(sys.prefix)')/.molegrad-stamp"
    if [ ! -w "$(dirname "$stamp")" ]; then stamp="build/.molegrad-stamp" && mkdir -p build; fi
  else
    if [ ! -x "$venv/bin/python" ]; then
      say "Creating the virtual environment $venv with $PYTHON"
      "$PYTHON" -m venv "$venv" || {
        echo "python -m venv failed (on Debian: apt-get install python3-venv)" >&2
        return 1
      }
    fi
    PYTHON="$PWD/$venv/bin/python"
    stamp="$venv/.molegrad-stamp"
  fi
  export PYTHON

  if [ "${MOLEGRAD_SKIP_INSTALL:-0}" = 1 ]; then return; fi

  # Installing again is needed only when what is installed or built has changed. An environment
  # with the extension serves MOLEGRAD_BUILD=0 too: the extension is then not loaded.
  # Likewise one that has the dependencies serves MOLEGRAD_DEPS=0.
  local sources build=1 deps=1 known="" had_build=0 had_deps=0
  if [ "${MOLEGRAD_BUILD:-1}" = 0 ]; then build=0; fi
  if [ "${MOLEGRAD_DEPS:-1}" = 0 ]; then deps=0; fi
  sources="$(cat pyproject.toml setup.py CMakeLists.txt $(find csrc -type f | sort) | sha256sum)"
  sources="${sources%% *} $extras ${MOLEGRAD_CUDA:-AUTO} ${MOLEGRAD_CUDA_ARCHITECTURES:-default} $PWD"
  if [ -f "$stamp" ]; then read -r had_build had_deps known <"$stamp" || true; fi
  if [ "$known" = "$sources" ] && [ "$had_build" -ge "$build" ] && [ "$had_deps" -ge "$deps" ]; then
    return
  fi
  if [ "$deps" = 0 ]; then
    "$PYTHON" - <molegrad/_needs.py
    say "Installing MoleGrad alone and building its extension"
    "$PYTHON" -m pip install --disable-pip-version-check --quiet --no-index --no-deps \
      --no-build-isolation -e .
    installed "$stamp" "$build 0 $sources"
    return
  fi
  if ! "$PYTHON" -c 'import torch' 2>/dev/null; then
    local torch="${MOLEGRAD_TORCH:-}"
    if [ -z "$torch" ]; then
      if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
        torch="torch==2.10.0"
      else
        torch="torch==2.13.0"
      fi
    fi
    say "Installing $torch"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "$torch"
  fi
  say "Installing MoleGrad [$extras] and building its extension"
  if [ "$venv" = none ]; then
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "setuptools>=77" cmake ninja \
      pybind11 || echo "pip could not reach an index: using the build tools that are installed"
  fi
  if ! "$PYTHON" -m pip install --disable-pip-version-check --quiet "${isolation[@]}" \
    -e ".[$extras]"; then
    echo "Without a network, with what is installed: MOLEGRAD_VENV=none MOLEGRAD_DEPS=0" >&2
    return 1
  fi
  installed "$stamp" "$build 1 $sources"
}

# STAMP TEXT: notes what was installed, and says it.
installed() {
  echo "$2" >"$1"
  "$PYTHON" -c 'import molegrad; print("MoleGrad:", molegrad.build_info())'
}

setup_environment
