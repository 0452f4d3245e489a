"""`export.json`, the description of an export, also for the code that deploys it."""

from __future__ import annotations

import shutil
import stat
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kd_lightning.runtime.errors import KDError
from kd_lightning.runtime.seals import check_seal, read_sealed, seal, write_sealed

FILE = "export.json"
VERSION = 1
"""Raised when a key of `export.json` is removed or changes its meaning, not for new keys."""


@dataclass(frozen=True)
class Exported:
    """An exported student.

    Attributes:
        format: One of `kd_lightning.export.formats.FORMATS`.
        quantize: The precision of its weights: `none`, `int8-weights`, `int8-dynamic`, `int8-static`, `fp16` or
            `bf16`.
        model: The file that is loaded.
        inputs: Names of its inputs, in order.
        class_names: In the order of the logits.
        predicts: The task's description for `kd_lightning.tasks.task_of`.
        max_length: Longest input in tokens; None for a network without text.
        texts: How many texts an example has; None likewise.
        pad_token_id: The padding id; None likewise.
        images: The preprocessing of images; None for a network without images.
        windows: Of questions with contexts `max_question_length` and `stride`; None for other inputs.
        network: The student's class.
        parameters: How many it has.
        bytes: Length of it, and of a file of weights beside it.
        opset: ONNX's; None in the other formats.
        run: The run, as the user named it.
        stage: The student's stage in that run.
        weights: The sha256 of that stage's file of weights.
        command: The command line that wrote it.
        parity: Its difference from the student (`kd_lightning.export.parity`).
        environment: The versions that wrote it.
        files: The sha256 of each of its files.
        version: Of this description.
    """

    format: str
    quantize: str
    model: str
    inputs: list[str]
    class_names: list[str]
    predicts: Any
    max_length: int | None
    texts: int | None
    pad_token_id: int | None
    images: dict[str, Any] | None
    windows: dict[str, int] | None
    network: str
    parameters: int
    bytes: int
    opset: int | None
    run: str
    stage: str
    weights: str
    command: str
    parity: dict[str, Any]
    environment: dict[str, str | None]
    files: dict[str, str]
    version: int = VERSION

    @property
    def title(self) -> str:
        """Its format and quantisation, for people."""
        return self.format if self.quantize == "none" else f"{self.format} {self.quantize}"

    def write(self, folder: Path) -> None:
        """Write `export.json`, with the sha256 of all other files of the folder and of itself."""
        names = [path.name for path in folder.iterdir() if path.name != FILE]
        write_sealed(folder / FILE, {**asdict(self), "files": seal(folder, names)})


def is_export(folder: Path) -> bool:
    """Return whether this is an export folder."""
    return (folder / FILE).is_file()


def read_exported(folder: Path) -> Exported:
    """Read `export.json`.

    Raises:
        KDError: It or a file that it names is damaged, or it has another version.
    """
    content = read_sealed(folder / FILE, "export it again")
    if content.get("version") != VERSION:
        found = content.get("version")
        raise KDError(f"{folder / FILE} has version {found}, and this kd_lightning reads {VERSION}: export it again")
    names = [field.name for field in fields(Exported)]
    if missing := [name for name in names if name not in content]:
        raise KDError(f"{folder / FILE} lacks {', '.join(missing)}: export it again")
    for name in (content["model"], *content["files"]):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise KDError(f"{folder / FILE} names {name!r}, which is outside its folder: export it again")
    check_seal(folder, content["files"], content["files"], "export it again")
    return Exported(**{name: content[name] for name in names})


def copy_export(folder: Path, out: Path, format: str, quantize: str, weights: str) -> None:
    """Copy an export of these very weights: its description and the files in its seal.

    Args:
        folder: The export.
        out: Where it goes; it does not exist.
        format: What it must be.
        quantize: Likewise.
        weights: The sha256 of the weights that it must have been made of.

    Raises:
        KDError: It is damaged or something else, or the folder holds a link, a pipe or a device; nothing was copied.
    """
    for path in (folder, *folder.rglob("*")):
        kind = path.lstat().st_mode
        if not (stat.S_ISDIR(kind) or stat.S_ISREG(kind)):
            raise KDError(f"{path} is a link or no regular file, and is not copied: remove it")
    exported = read_exported(folder)
    for name, expected in (("format", format), ("quantize", quantize), ("weights", weights)):
        if (found := getattr(exported, name)) != expected:
            raise KDError(f"{folder / FILE} has {name} {found!r}, expected {expected!r}")
    for name in (FILE, *exported.files):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, out / name, follow_symlinks=False)
