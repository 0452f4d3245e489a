#!/usr/bin/env bash
# What only a GPU can show, in at most 8 minutes: first the tests marked `gpu`, then timings. See docs/processes.md.
#   scripts/gpu_check.sh --gather         here, with a network: put what that machine lacks into .gpu_wheels/ (under 60 MB)
#   scripts/gpu_check.sh --run [FILE]     there, without one: check, and write FILE (results/gpu.json)
#   scripts/gpu_check.sh --cpu [FILE]     here: the same on a CPU, with small sizes
set -euo pipefail
cd "$(dirname "$0")/.."
carried=.gpu_wheels
export PYTHONPATH=$PWD:$PWD/scripts PYTHONUNBUFFERED=1
case "${1:-}" in
--gather)
  exec "${PYTHON:-.venv/bin/python}" -m gpu.gather "$carried"
  ;;
--run)
  python=${PYTHON:-python3}
  environment=$(mktemp -d)
  trap 'rm -rf "$environment"' EXIT
  # The machine's own packages, also where its Python is a virtual environment itself, and beside them what was carried.
  "$python" -m venv --without-pip --system-site-packages "$environment"
  own=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$own/machine.pth"
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --target "$own" "$carried"/*.whl
  export KD_LIGHTNING_HOME=$environment/home GPU_CHECK_DEVICE=${GPU_CHECK_DEVICE:-cuda} # cpu: to try this very path here
  mkdir -p "$KD_LIGHTNING_HOME"
  cp -r "$carried/assets" "$KD_LIGHTNING_HOME/assets"
  "$environment/bin/python" -m gpu.check --device "$GPU_CHECK_DEVICE" --out "${2:-results/gpu.json}"
  ;;
--cpu)
  export GPU_CHECK_DEVICE=cpu
  exec "${PYTHON:-.venv/bin/python}" -m gpu.check --device cpu --out "${2:-runs/gpu_check_cpu.json}"
  ;;
*)
  sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
  exit 2
  ;;
esac
