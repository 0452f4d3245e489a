"""Run the tests marked `gpu`, then the timings, each part in a process of its own with a limit; keep what each found.

python -m gpu.check --device cuda --out results/gpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from kd_lightning.evaluation.profiling import environment
from kd_lightning.runtime.files import write_file

ROOT = Path(__file__).resolve().parents[2]
TESTS = "tests"
PARTS = {
    "ceilings": 30, TESTS: 150, "fused": 60, "overhead": 80, "cached": 60, "teacher_pass": 45, "end_to_end": 120,
    "overlap": 90, "lm_steps": 90, "lm_losses": 45, "lm_generation": 45,
}  # fmt: skip
"""Seconds at most, in the order of their worth."""
ON_A_GPU, ON_A_CPU = 480.0, 1800.0
"""Seconds for all."""
FIGURE = re.compile(r"^figure (\{.*\})$", re.MULTILINE)


def run(part: str, device: str, limit: float) -> dict[str, Any]:
    """Run a part; say how it ended, what it found, and the end of its output where it failed."""
    command = [sys.executable, "-m", "gpu.timings", part]
    if part == TESTS:
        command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-q", "-p", "no:cacheprovider", "-rfEs"]
        command += ["-n", "6", "--dist", "worksteal"] if device == "cuda" else []
    started = time.monotonic()
    variables = {**os.environ, "GPU_CHECK_DEVICE": device}
    with subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            said, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it started
            said, _ = process.communicate(timeout=60)
            said += f"\nended after its limit of {limit:.0f} s"
    figures = [json.loads(found) for found in FIGURE.findall(said)]
    ok = process.returncode == 0
    result: dict[str, Any] = {"ok": ok, "seconds": time.monotonic() - started, "figures": figures}
    if part == TESTS:
        result["summary"] = next((line for line in reversed(said.splitlines()) if re.search(r"\d+ \w+ in ", line)), "")
        result["lines"] = sorted(set(re.findall(r"^(?:FAILED|ERROR|SKIPPED) .*$", said, re.MULTILINE)))
    if not ok:
        result["output"] = said[-20_000:]
    return result


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    given = parser.parse_args()
    content: dict[str, Any] = {
        "command": shlex.join(["bash", "scripts/gpu_check.sh", "--cpu" if given.device == "cpu" else "--run"]),
        "device": given.device, "environment": environment(), "parts": {},
    }  # fmt: skip
    given.out.parent.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + (ON_A_GPU if given.device == "cuda" else ON_A_CPU)
    for part in given.only:
        warming = _warming() if part == TESTS and given.device == "cuda" else None
        left = ends - time.monotonic()
        content["parts"][part] = run(part, given.device, min(left, PARTS[part]) if given.device == "cuda" else left)
        if warming is not None:
            if warming.poll() is None:
                os.killpg(warming.pid, signal.SIGKILL)
            warming.wait(60)
        write_file(given.out, json.dumps(content, indent=1) + "\n")  # after each: a crash or a limit loses nothing
        _say(part, content["parts"][part])
    failed = [part for part, result in content["parts"].items() if not result["ok"]]
    sys.exit(f"gpu_check: failed: {', '.join(failed)}" if failed else 0)


def _warming() -> subprocess.Popen[bytes]:
    """Compile what the later timings run, into torch's cache on disk, while the tests need little of the card."""
    return subprocess.Popen(
        [sys.executable, "-m", "gpu.timings", "end_to_end", "overlap"], cwd=ROOT, start_new_session=True,
        env={**os.environ, "GPU_CHECK_WARMING": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _say(part: str, result: dict[str, Any]) -> None:
    print(f"== {part}: {'ok' if result['ok'] else 'FAILED'} in {result['seconds']:.0f} s {result.get('summary', '')}")
    for line in result.get("lines", []):
        print(line[:300])
    for figure in result["figures"]:
        goal = "" if figure["goal"] is None else f"  goal {figure['goal']}: {'met' if figure['met'] else 'MISSED'}"
        print(f"{figure['name']}: {figure['median']:.4g} {figure['unit']}{goal}  {figure['note']}")
    if not result["ok"]:
        print(result["output"][-2500:])


if __name__ == "__main__":
    main()
