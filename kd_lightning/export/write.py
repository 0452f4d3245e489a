"""Writes an export: plan, write to a temporary folder, compare with the student, move into place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kd_lightning.config.trust import trusting
from kd_lightning.export.exported import Exported
from kd_lightning.export.formats import Format, Written, check_choice
from kd_lightning.export.source import Source, find_student, open_source
from kd_lightning.runtime.errors import ConfigError, KDError, environment_fault
from kd_lightning.runtime.files import check_place, naming, temporary_folder

if TYPE_CHECKING:
    from kd_lightning.export.parity import Parity


@dataclass(frozen=True)
class Plan:
    """What to export, and where.

    Attributes:
        run: As the user named it.
        stage: The student's folder.
        format: One of `formats.FORMATS`.
        quantize: One of the format's.
        out: The export folder.
        command: The command line.
        card: Whether to write a model card.
    """

    run: Path
    stage: Path
    format: str
    quantize: str
    out: Path
    command: str
    card: bool = True


def plan(run: Path, format: str, quantize: str, out: Path, command: str, seed: int | None = None) -> Plan:
    """Check the request; nothing is loaded or written.

    Raises:
        KDError: No such format, no finished student, or a folder that is not empty.
    """
    check_choice(format, quantize)
    check_vacant(out)
    return Plan(run, find_student(run, seed), format, quantize, out, command)


def export(plan: Plan) -> tuple[Exported, Parity]:
    """Carry out a plan: afterwards the complete export folder exists, or nothing.

    Raises:
        KDError: The format cannot hold the student, or the export differs from it.
    """
    from kd_lightning.export.card import write_card
    from kd_lightning.export.graph import following
    from kd_lightning.export.parity import measure_parity, require

    chosen = check_choice(plan.format, plan.quantize)
    source = open_source(plan.stage)
    chosen.check(source.model)
    with _in_one_line(plan), filled(plan.out) as folder:
        written = chosen.write(source, plan.quantize, folder)
        save_tokenizer(source, folder)
        exported = describe(plan, source, chosen, written, folder)
        with trusting():  # this process wrote it
            loaded = chosen.load(folder, exported)
        parity = following(
            f"{exported.title} cannot run {exported.network}",
            lambda: measure_parity(source.model.network, loaded, source.held_out, source.data.task, plan.quantize),
        )
        require(parity, exported.title)
        exported = Exported(**{**asdict(exported), "parity": parity.to_dict()})
        exported.write(folder)
        if plan.card:
            write_card(exported, source, folder)
    return exported, parity


@contextmanager
def _in_one_line(plan: Plan) -> Iterator[None]:
    """Raise a one-line `KDError` for whatever goes wrong in disks, quantisers and runtimes."""
    from kd_lightning.export.graph import reason

    try:
        yield
    except KDError:
        raise
    except Exception as error:
        requested = plan.format if plan.quantize == "none" else f"{plan.format} --quantize {plan.quantize}"
        why = environment_fault(error) or reason(error)
        raise KDError(f"--format {requested} to {plan.out} failed: {why}; nothing was written") from error


def describe(plan: Plan, source: Source, chosen: Format, written: Written, folder: Path) -> Exported:
    """Return the description of the export, without its parity."""
    from kd_lightning.evaluation.generation import generator_of
    from kd_lightning.evaluation.profiling import environment
    from kd_lightning.models.size import count_parameters
    from kd_lightning.training.run_folder import read_stage

    model = source.model
    return Exported(
        format=plan.format,
        quantize=plan.quantize,
        model=chosen.FILE,
        inputs=written.inputs,
        class_names=model.class_names,
        predicts=model.task.description,
        max_length=model.max_length,
        texts=model.texts,
        pad_token_id=None if model.tokenizer is None else int(model.tokenizer.pad_token_id),
        images=None if model.images is None else asdict(model.images),
        windows=model.windows,
        network=type(generator_of(model.network) or model.network).__name__,
        parameters=count_parameters(model.network).total,
        bytes=sum((folder / name).stat().st_size for name in (chosen.FILE, *written.beside)),
        opset=written.opset,
        run=str(plan.run),
        stage=str(plan.stage.relative_to(plan.run)) if plan.stage.is_relative_to(plan.run) else plan.stage.name,
        weights=read_stage(plan.stage)["files"]["model.safetensors"],
        command=plan.command,
        parity={},
        files={},
        environment=versions(chosen, environment()["versions"]),
    )


def versions(chosen: Format, known: dict[str, str | None]) -> dict[str, str | None]:
    """Return the versions of the packages that wrote the model."""
    from importlib.metadata import version

    return known | {name: version(name) for name in chosen.NEEDS}


def save_tokenizer(source: Source, folder: Path) -> None:
    """Save the tokenizer beside the model, with its longest text: as a language model has positions."""
    from kd_lightning.data.text.tokens import write_tokenizer
    from kd_lightning.evaluation.generation import generator_of, positions_of

    tokenizer = source.model.tokenizer
    if tokenizer is not None:
        generator = generator_of(source.model.network)
        longest = None if generator is None else positions_of(generator.config)
        if (limit := longest or source.model.max_length) is not None:
            tokenizer.model_max_length = limit
        write_tokenizer(tokenizer, folder)


def check_vacant(out: Path) -> None:
    """Refuse a folder that holds anything, or that cannot be replaced."""
    try:
        there = out.is_dir()
        full = there and any(out.iterdir())
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise ConfigError(f"--out {out} cannot be written ({error.strerror}): choose another folder") from error
    if there:
        if full:
            raise ConfigError(f"--out {out} is not empty: choose another folder, or remove it")
        if out.resolve() == Path.cwd():
            raise ConfigError(f"--out {out} is the current folder, which would be replaced: name one inside it")
    elif out.exists() or out.is_symlink():
        raise ConfigError(f"--out {out} is a file: choose another folder")
    check_place(out.resolve().parent if there else out, f"--out {out}")


@contextmanager
def filled(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out` that becomes `out` in one step; after an error it is removed.

    Where `out` is a link to an empty folder, that one is filled.

    Raises:
        KDError: It cannot be written there.
    """
    target = out.resolve()
    missing = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = ExitStack()
        temporary = made.enter_context(temporary_folder(target.parent, "kd-export"))
    except OSError as error:
        raise KDError(f"--out {out} cannot be written ({error.strerror}): choose another folder") from error
    try:
        with naming(out):
            yield temporary
        try:
            temporary.rename(target)
        except OSError as error:
            raise KDError(f"--out {out} has been filled or removed meanwhile ({error.strerror})") from error
    finally:
        made.close()
        for folder in missing:
            with suppress(OSError):  # it is not empty any more
                folder.rmdir()
