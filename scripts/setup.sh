# Prepares the Python environment. Source it: it leaves PYTHON set to the interpreter to use.
#
#   MOLEGRAD_VENV   folder of the virtual environment (default .venv here); "none" uses $PYTHON or
#                   python3 as it is, with --no-build-isolation, for machines that bring torch along
#   MOLEGRAD_TORCH  what pip installs as torch where there is none (default: the newest release
#                   built for CUDA 12.8 beside an NVIDIA GPU, otherwise torch==2.13.0)
#   MOLEGRAD_BUILD  0 leaves the native extension out (see README)
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
  local venv="${MOLEGRAD_VENV:-.venv}" isolation=() stamp
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
  local sources build="${MOLEGRAD_BUILD:-1}" known=""
  sources="$(cat pyproject.toml setup.py CMakeLists.txt $(find csrc -type f | sort) | sha256sum)"
  sources="${sources%% *} cuda=${MOLEGRAD_CUDA:-AUTO} $PWD"
  if [ -f "$stamp" ]; then known="$(cat "$stamp")"; fi
  if [ "$known" = "$sources built" ] || [ "$build$known" = "0$sources unbuilt" ]; then
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
  say "Installing MoleGrad [gpt,test] and building its extension"
  if [ "$venv" = none ]; then
    "$PYTHON" -m pip install --quiet --disable-pip-version-check setuptools cmake ninja pybind11 ||
      echo "pip could not reach an index: using the build tools that are installed"
  fi
  "$PYTHON" -m pip install --disable-pip-version-check --quiet "${isolation[@]}" -e ".[gpt,test]"
  if [ "$build" = 0 ]; then echo "$sources unbuilt" >"$stamp"; else echo "$sources built" >"$stamp"; fi
  "$PYTHON" -c 'import molegrad; print("MoleGrad:", molegrad.build_info())'
}

setup_environment
