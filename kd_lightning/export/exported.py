"""What an export folder says of itself: `export.json`, which whoever deploys the model reads too."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kd_lightning.runtime.errors import KDError
from kd_lightning.runtime.seals import check_seal, read_sealed, seal, write_sealed

FILE = "export.json"
VERSION = 1
"""Raised when a key of `export.json` changes its meaning or goes away; new keys do not raise it."""


@dataclass(frozen=True)
class Exported:
    """An exported student.

    Attributes:
        format: `safetensors`, `huggingface`, `pt2` or `onnx`.
        quantize: What its numbers became: `none`, `int8-dynamic`, `int8-static`, `fp16` or `bf16`.
        model: The file with the weights.
        inputs: Names of what it reads, in this order.
        class_names: In the order of the logits.
        predicts: What `kd_lightning.tasks.task_of` makes the task of.
        max_length: Longest input in tokens; None for a network that reads no text.
        texts: How many texts an example has; None likewise.
        pad_token_id: What shorter texts of a batch are filled up with; None likewise.
        images: What an image is made into; None for a network that reads no images.
        network: The student's class.
        parameters: How many it has.
        bytes: Length of the weights' file.
        opset: ONNX's; None in the other formats.
        run: The run it came from, as it was named.
        stage: Which of the run's trainings.
        command: What made it.
        parity: How near it is to the student (`kd_lightning.export.parity`).
        environment: The versions that wrote it.
        files: The sha256 of each file that it is read from.
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
    network: str
    parameters: int
    bytes: int
    opset: int | None
    run: str
    stage: str
    command: str
    parity: dict[str, Any]
    environment: dict[str, str | None]
    files: dict[str, str]
    version: int = VERSION

    @property
    def title(self) -> str:
        """Its format and what its numbers became, in a word."""
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
        KDError: It or a file that it names is damaged, or it is of a version that this one does not know.
    """
    content = read_sealed(folder / FILE, "export it again")
    if content.get("version") != VERSION:
        found = content.get("version")
        raise KDError(f"{folder / FILE} has version {found}, and this kd_lightning reads {VERSION}: export it again")
    names = [field.name for field in fields(Exported)]
    if missing := [name for name in names if name not in content]:
        raise KDError(f"{folder / FILE} lacks {', '.join(missing)}: export it again")
    check_seal(folder, content["files"], content["files"], "export it again")
    return Exported(**{name: content[name] for name in names})
