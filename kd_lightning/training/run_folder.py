"""The files of a run's stages, and loading a trained network on any machine.

A stage folder (`RUN/teacher`, `RUN/seed_0/distill`) is finished once it holds `stage.json`, which is written last.
Beside it: `model.json` (how to rebuild the network), `model.safetensors` (its weights), `task.json` and `tokenizer/`
(what goes in and which classes come out), and while it trains `checkpoints/`. `stage.json` holds the sha256 of these
files and of itself, which are verified when they are loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.runtime.files import replacing, write_file
from kd_lightning.runtime.fingerprints import differences, read_json, write_json
from kd_lightning.runtime.seals import check_seal, read_sealed, seal, write_sealed

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from kd_lightning.data.image.store import ImageFormat
    from kd_lightning.tasks import Task
    from kd_lightning.tasks.evaluation import Model
    from kd_lightning.teachers.frozen import Precision

NETWORK = ("model.json", "model.safetensors", "task.json", "tokenizer")
"""The files of a finished stage's network."""

LOGS = ("csv",)
"""The files of its learning curves."""

FURTHER = "further_"
"""The folders, in a teacher's, of the trainings that go on from it."""

BASELINES = ("baseline_initialised", "baseline")
TAUGHT = ("finetune", "distill")
"""The stages of a student, in order."""


@dataclass
class TrainedModel:
    """A network loaded from a run folder, with its tokenizer and task.

    Attributes:
        network: In eval mode, on the CPU.
        tokenizer: Turns text into its inputs; None for a network without one.
        class_names: Names of the C classes, in the order of the logits.
        max_length: Longest input in tokens, longer ones are cut; None for a network without text.
        texts: How many texts an example has: 1, or 2 for pairs; None for a network without text.
        folder: The folder it was loaded from.
        task: The task.
        images: The preprocessing of images; None for a network without images.
        windows: Of questions with contexts `max_question_length` and `stride`; None for other inputs.
    """

    network: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    class_names: list[str]
    max_length: int | None
    texts: int | None
    folder: Path
    task: Task
    images: ImageFormat | None = None
    windows: dict[str, int] | None = None


def save_network(
    folder: Path, network: nn.Module, settings: dict[str, Any], task: dict[str, Any], tokenizer: Any | None
) -> None:
    """Write the files that `load_run` needs.

    Args:
        folder: The stage's folder.
        network: The trained network.
        settings: The `_target_` settings it was built from, used if the network has no description.
        task: `class_names`, the data's `input_format`, and `role`, whose inputs the network uses.
        tokenizer: A Hugging Face tokenizer, or None.
    """
    from safetensors.torch import save_file

    from kd_lightning.models.rebuild import describe

    write_json(folder / "model.json", describe(network) or settings)
    write_json(folder / "task.json", task)
    if tokenizer is not None:
        from kd_lightning.data.text.tokens import write_tokenizer

        write_tokenizer(tokenizer, folder / "tokenizer")
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in network.state_dict().items()}
    with replacing(folder / "model.safetensors") as temporary:
        save_file(state, temporary)


def finish_stage(folder: Path, record: dict[str, Any]) -> None:
    """Write `stage.json`, which marks a stage as finished, with its record and the sha256 of its files."""
    write_sealed(folder / "stage.json", {**record, "files": seal(folder, (*NETWORK, *LOGS))})


def read_stage(folder: Path) -> dict[str, Any]:
    """Read the record of a finished stage.

    Raises:
        KDError: It is missing or damaged.
    """
    return read_sealed(folder / "stage.json", train_again(folder))


def check_stage(folder: Path, names: Iterable[str] = (*NETWORK, *LOGS)) -> dict[str, Any]:
    """Read the record of a finished stage, after verifying its files.

    Raises:
        KDError: Names the file that is missing, damaged or from elsewhere.
    """
    record = read_stage(folder)
    check_seal(folder, record["files"], names, train_again(folder))
    return record


def read_task(folder: Path) -> dict[str, Any]:
    """Read a stage's inputs and outputs (`task.json`), and its training examples (`data`)."""
    task: dict[str, Any] = read_json(folder / "task.json")
    return task


def train_again(folder: Path) -> str:
    """Return what to do about a damaged finished stage, for messages."""
    return f"restore it, or remove {folder} and run the same kd-train again, which trains that stage again"


def load_run(folder: str | Path, seed: int | None = None, trust: bool = False) -> TrainedModel:
    """Load a trained student, or any stage's network.

    Networks of this package and of `transformers` are rebuilt from a description that reaches no other code. A network
    of your own is a class named in `model.json`, which is imported and called only if you trust the folder.

    Args:
        folder: A run folder, or the folder of one of its stages.
        seed: Which seed of a run with several; None takes the one that is best on validation.
        trust: Whether the folder may run code that it names, as that of a network of your own: see docs/security.md.

    Raises:
        KDError: The folder holds no finished network, a damaged one, or one that needs `trust`.
    """
    return load_stage(find_stage(Path(folder), seed), trust)


def load_stage(stage: Path, trust: bool = False) -> TrainedModel:
    """Load the network of one finished training; see `load_run`."""
    from safetensors.torch import load_file

    from kd_lightning.config.trust import build_saved, trusting
    from kd_lightning.models.rebuild import from_description, is_description

    check_stage(stage, NETWORK)
    settings = read_json(stage / "model.json")
    with trusting(trust):
        described = is_description(settings)
        network = from_description(settings) if described else build_saved(settings, stage / "model.json")
    network.load_state_dict(load_file(stage / "model.safetensors"))
    task = read_task(stage)
    tokenizer = None
    if (stage / "tokenizer").is_dir():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            str(stage / "tokenizer"), local_files_only=True, trust_remote_code=False
        )
    images = None
    if "images" in task:
        from kd_lightning.data.image.store import ImageFormat

        images = ImageFormat(**task["images"])
    from kd_lightning.tasks import task_of

    names = task["class_names"]
    predicts = task_of(task.get("predicts", len(names)))
    return TrainedModel(
        network.eval(), tokenizer, names, task.get("max_length"), task.get("texts"), stage, predicts, images,
        task.get("windows"),
    )  # fmt: skip


def teacher_precision(stage: Path, run: Path | None = None) -> Precision:
    """Return the precision in which a run's report scores its teacher, as it predicts on a CPU.

    Args:
        stage: The teacher's stage folder.
        run: The run that it teaches, where another one trained it.
    """
    root = run_root(run or stage)
    given = None if root is None else (read_config(root).get("teacher") or {}).get("precision")
    return "float32" if given in (None, "float16") else given  # CPUs have no float16


def model_of(trained: TrainedModel) -> Model:
    """Return a loaded network as a model on the CPU: a teacher in its run's precision."""
    from kd_lightning.tasks.evaluation import of_network

    if not is_finished(trained.folder) or read_task(trained.folder)["role"] != "teacher":
        return of_network(trained.network)
    from kd_lightning.teachers import FrozenTeacher

    return FrozenTeacher(trained.network, teacher_precision(trained.folder))


def find_stage(folder: Path, seed: int | None = None) -> Path:
    """Return the stage folder of a stage or run: of a run, its best student on validation.

    Distilled and fine-tuned students come before baselines, whatever their scores. If a run should have
    one but does not, no other student replaces it.

    Raises:
        ConfigError: There is no student.
        KDError: The run is unfinished.
    """
    if is_finished(folder):
        return best_training(folder)
    if (folder / "settings.json").is_file():
        raise KDError(f"{folder} is unfinished, it has no stage.json: {GO_ON}")
    seeds = [root for root in sorted(folder.glob("seed_*" if seed is None else f"seed_{seed}")) if root.is_dir()]
    taught, baselines = (
        [root / stage for root in seeds for stage in stages if is_finished(root / stage)]
        for stages in (TAUGHT, BASELINES)
    )
    found = taught or baselines
    if unfinished := _unfinished(folder, seeds, seed):
        place = unfinished[-1]
        how = f"{place.relative_to(folder)} {'has begun' if place.is_dir() else 'is missing'}"
        instead = f"; or name a finished one explicitly: {', '.join(map(str, found))}" if found else ""
        raise KDError(f"{folder} is unfinished ({how}): {GO_ON}{instead}")
    if not found:
        which = "" if seed is None else f" of seed {seed}"
        raise ConfigError(f"{folder} holds no finished student{which}: expected a folder that kd-train wrote")
    return best_stage(found)


GO_ON = "run the same kd-train again to resume it"


def is_finished(folder: Path) -> bool:
    """Return whether a stage's training has ended."""
    return (folder / "stage.json").is_file()


def _unfinished(folder: Path, seeds: Sequence[Path], seed: int | None) -> list[Path]:
    """Return the distillations and fine-tunings that a run should have but that are not finished."""
    if (folder / "config.yaml").is_file():
        cfg = read_config(folder)
        requested = set(cfg.get("stages", ()))
        if seeds and seed is None and "seed" in cfg and "seeds" in cfg:
            known = {folder / f"seed_{cfg['seed'] + number}" for number in range(cfg["seeds"])}
            seeds = sorted({*seeds, *known})
    else:
        requested = {"distill"}
    wanted = [(root / stage, stage in requested) for root in seeds for stage in reversed(TAUGHT)]
    return [place for place, is_requested in wanted if not is_finished(place) and (is_requested or place.is_dir())]


def write_config(folder: Path, text: str) -> None:
    """Write the configuration of a run, `config.yaml`, with a checksum in its first line."""
    write_file(folder / "config.yaml", f"{CONFIG_SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n{text}")


def read_config(folder: Path) -> dict[str, Any]:
    """Read the configuration of a run as plain values, without resolving or importing.

    Raises:
        KDError: It is missing or damaged.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError  # type: ignore[import-untyped]

    path = folder / "config.yaml"
    try:
        text = path.read_text(encoding="utf-8")
        first, _, rest = text.partition("\n")
        if first.startswith(CONFIG_SEAL) and first != CONFIG_SEAL + hashlib.sha256(rest.encode()).hexdigest():
            raise KDError(
                f"{path} was damaged or changed since the run: restore it, or remove it and run the same kd-train "
                "again, which writes it again; if the change is intended, remove its first line"
            )
        cfg = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise KDError(f"{path} cannot be read ({reason}): remove it and run the same kd-train again") from error
    if not isinstance(cfg, dict) or not cfg:
        raise KDError(f"{path} is not a run's configuration: remove it and run the same kd-train again")
    return {str(key): value for key, value in cfg.items()}


CONFIG_SEAL = "# sha256 of what follows: "


def run_root(stage: Path) -> Path | None:
    """Return the folder of a stage's run, if it has a configuration."""
    above = [stage, *stage.absolute().parents[:2]]  # RUN/teacher, RUN/seed_0/distill
    return next((folder for folder in above if (folder / "config.yaml").is_file()), None)


def teacher_stage(folder: Path) -> Path | None:
    """Return the finished teacher stage of a folder for `teacher.checkpoint`: the run's, or itself.

    Raises:
        KDError: It has begun and is not finished.
    """
    for place in (folder / "teacher", folder):
        if is_finished(place):
            return best_training(place)
        if (place / "settings.json").is_file():
            raise KDError(f"{place} is unfinished, it has no stage.json: {GO_ON}")
    return None


def trainings_of(folder: Path) -> list[Path]:
    """Return a finished stage and the trainings in it that went on from its weights, in order."""
    return [folder, *(place for place in sorted(folder.glob(f"{FURTHER}[0-9]")) if is_finished(place))]


def best_training(folder: Path) -> Path:
    """Return that of a stage's trainings that is best on validation, of equal ones the first."""
    found = trainings_of(folder)
    return best_stage(found) if len(found) > 1 else folder


def best_stage(stages: Sequence[Path]) -> Path:
    """Return that of finished stages that is best on validation, of equal ones the first."""
    return max(stages, key=_goodness)


def validation_score(record: dict[str, Any]) -> float:
    """Return the score that selected a stage's weights.

    Raises:
        KDError: The record is of an older version.
    """
    if "monitor" not in record:
        raise KDError("stage.json is of an older version: it does not name the score that selects weights; train again")
    return float(record["validation"][record["monitor"]])


def _goodness(stage: Path) -> float:
    """Return a stage's validation score, the larger the better."""
    record = read_stage(stage)
    return validation_score(record) * (1 if record["mode"] == "max" else -1)


def check_fingerprint(folder: Path, fingerprint: str, settings: dict[str, Any]) -> bool:
    """Return whether a stage is finished; refuse one with other settings.

    Raises:
        ConfigError: The folder has other settings; names the differences.
        KDError: A file of the finished stage is damaged or missing.
    """
    finished = is_finished(folder)
    if not finished and not (folder / "settings.json").is_file():
        return False
    record = check_stage(folder) if finished else read_sealed(folder / "settings.json", remove_it(folder))
    if record["fingerprint"] == fingerprint:
        return finished
    changed = [
        "data: examples, labels, splits, tokenizer or max_length changed" if key == "data changed" else key
        for key in sorted(differences(record["settings"], settings))
    ]
    raise ConfigError(
        f"{folder} holds a {'finished' if finished else 'begun'} training with other settings "
        f"({'; '.join(changed[:3])}): choose another name=... or remove it"
    )


def remove_it(folder: Path) -> str:
    """Return what to do about a damaged unfinished stage, for messages."""
    return f"remove {folder} and run the same kd-train again, which restarts that stage"
