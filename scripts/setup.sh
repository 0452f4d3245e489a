#!/usr/bin/env bash
# Makes the virtual environment and installs this project in it with the tested versions. Says in one line what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
fail() { echo "setup: $*" >&2; exit 1; }

python=""
for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
  if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
[ -n "$python" ] || fail "needs Python 3.11 or later, found $(python3 --version 2>/dev/null || echo none); name one with: make PYTHON=/path/to/python"
if [ ! -x "$venv/bin/pip" ] && ! "$python" -m venv "$venv" >/dev/null 2>&1; then
  rm -rf "$venv" # half made: the next try must start anew
  fail "could not make $venv with $python (on Debian: apt-get install python3-venv)"
fi

echo "setup: installing the tested versions into $venv (a few minutes)"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# torch first and by its exact version: asked for as a dependency, pip may take a build several gigabytes larger.
torch=$(grep '^torch==' constraints.txt)
for args in "$torch" "-e .[dev,docs,export,faker,hub,lm,slurm,sweep]"; do
  # shellcheck disable=SC2086
  if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt $args >"$log" 2>&1; then
    # Whether the registry answers at all is asked of it: pip's own last words depend on what it had found before.
    if ! "$venv/bin/python" -m pip index versions pip --disable-pip-version-check >/dev/null 2>&1; then
      fail "the package registry cannot be reached (no network?); run the same command again when it can"
    fi
    cat "$log" >&2
    fail "installing $args failed (above)"
  fi
done
echo "setup: done; next: source $venv/bin/activate, then kd-doctor checks the installation"
