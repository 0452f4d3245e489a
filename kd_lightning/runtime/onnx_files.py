"""ONNX files: teachers from any framework, and exports. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd_lightning.runtime.assets import fetch
from kd_lightning.runtime.errors import ConfigError, KDError

ASSETS = {"rampart": "model.onnx"}
"""The assets that are ONNX files, with their tokenizers."""


def onnx_file(checkpoint: str, key: str = "teacher.checkpoint") -> Path | None:
    """Return the ONNX file that a checkpoint names; None: it names something else.

    Args:
        checkpoint: An asset, or a file that ends in .onnx.
        key: The key that names it.

    Raises:
        ConfigError: There is no such file.
    """
    if checkpoint in ASSETS:
        return fetch(checkpoint) / ASSETS[checkpoint]
    path = Path(checkpoint).expanduser()
    if path.suffix != ".onnx":
        return None
    if not path.is_file():
        raise ConfigError(f"{key}={checkpoint}: there is no such file")
    return path


def is_onnx(checkpoint: str) -> bool:
    """Return whether a checkpoint is the name of an ONNX file, which need not be there."""
    return checkpoint in ASSETS or checkpoint.endswith(".onnx")


def near(file: Path) -> list[Path]:
    """Return where a file's tokenizer and `config.json` may be: its folder, one of it, and the one above."""
    return [file.parent, file.parent / "tokenizer", file.parent.parent]


def missing_extra(file: Path) -> ConfigError:
    """Return the refusal of a file where what reads it is not installed."""
    return ConfigError(f"{file} needs onnx and onnxruntime: pip install 'kd-lightning[export]'")


def refusals() -> tuple[type[Exception], ...]:
    """Return what onnxruntime raises for a file or an input that it refuses."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "RuntimeException")
    return tuple(getattr(state, name) for name in names)


def weight_files(file: Path) -> list[Path]:
    """Return a file and those beside it that it keeps weights in.

    Raises:
        ConfigError: onnx is not installed.
        KDError: It is no ONNX file, or one of them is missing or outside of its folder.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    except ImportError as error:
        raise missing_extra(file) from error
    try:
        tensors = onnx.load(str(file), load_external_data=False).graph.initializer
    except DecodeError as error:
        raise KDError(f"{file} is no ONNX file, or is damaged: {error}") from error
    places = {entry.value for one in tensors for entry in one.external_data if entry.key == "location"}
    found = [file, *(file.parent / place for place in sorted(places))]
    if outside := [place for place in places if Path(place).is_absolute() or ".." in Path(place).parts]:
        raise KDError(f"{file} names weights outside of its folder, {outside[0]}: they are not read")
    if missing := [one for one in found if not one.is_file()]:
        raise KDError(f"{file} keeps weights in {missing[0].name}, which is not beside it")
    return found


def open_session(file: Path, threads: int) -> Any:
    """Open a file in onnxruntime, on the CPU; no operators of elsewhere are loaded.

    Args:
        file: The model.
        threads: Of each operator.

    Raises:
        ConfigError: onnxruntime is not installed.
        KDError: It cannot read the file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise missing_extra(file) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except refusals() as error:
        reason = str(error).strip().splitlines()[0]
        raise KDError(f"{file}: onnxruntime cannot read it: {reason[:300]}") from error
