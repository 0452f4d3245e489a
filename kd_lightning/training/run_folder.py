"""The files of a run: what a stage leaves behind, and how a trained network is read back on any machine.

A stage folder (`RUN/teacher`, `RUN/seed_0/distill`) is finished once it holds `stage.json`, which is written last.
Beside it: `model.json` (how to rebuild the network), `model.safetensors` (its weights), `task.json` and `tokenizer/`
(what goes in and which classes come out), and while it trains `checkpoints/`. `stage.json` holds the sha256 of these
files and of itself; whatever is read back is held against them.
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

NETWORK = ("model.json", "model.safetensors", "task.json", "tokenizer")
"""What a finished stage's network is read from."""

LOGS = ("csv",)
"""What its learning curves are read from."""

BASELINES = ("baseline_initialised", "baseline")
TAUGHT = ("finetune", "distill")
"""The stages of a student, the last ones first."""


@dataclass
class TrainedModel:
    """A network read back from a run folder, with what it takes to use it.

    Attributes:
        network: In eval mode, on the CPU.
        tokenizer: Turns text into its inputs; None for a network without one.
        class_names: Names of the C classes, in the order of the logits.
        max_length: Longest input in tokens, the rest is cut; None for a network that reads no text.
        texts: How many texts an example has: 1, or 2 for pairs; None for a network that reads no text.
        folder: Where it was read from.
        task: What it predicts: a class, a score, or those of several tasks.
        images: What an image is made into before the network reads it; None for a network that reads no images.
    """

    network: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    class_names: list[str]
    max_length: int | None
    texts: int | None
    folder: Path
    task: Task
    images: ImageFormat | None = None


def save_network(
    folder: Path, network: nn.Module, settings: dict[str, Any], task: dict[str, Any], tokenizer: Any | None
) -> None:
    """Write what `load_model` needs.

    Args:
        folder: The stage's folder.
        network: The trained network.
        settings: The `_target_` settings it was built from, used where the network cannot describe itself.
        task: `class_names`, the data's `input_format`, and `role`, whose inputs the network reads.
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
    """Write `stage.json`, with which a stage is finished: its record, and the sha256 of its files."""
    write_sealed(folder / "stage.json", {**record, "files": seal(folder, (*NETWORK, *LOGS))})


def read_stage(folder: Path) -> dict[str, Any]:
    """Read the record of a finished stage.

    Raises:
        KDError: It is missing or damaged.
    """
    return read_sealed(folder / "stage.json", train_again(folder))


def check_stage(folder: Path, names: Iterable[str] = (*NETWORK, *LOGS)) -> dict[str, Any]:
    """Read the record of a finished stage, whose files must be those it was finished with.

    Raises:
        KDError: Names the file that is missing, damaged or from elsewhere.
    """
    record = read_stage(folder)
    check_seal(folder, record["files"], names, train_again(folder))
    return record


def read_task(folder: Path) -> dict[str, Any]:
    """Read what goes into a stage's network and what comes out, and on which examples it was trained (`data`)."""
    task: dict[str, Any] = read_json(folder / "task.json")
    return task


def train_again(folder: Path) -> str:
    """Return what can be done about a finished stage that is damaged."""
    return f"restore it, or remove {folder} and run the same kd-train again, which trains that stage anew"


def load_run(folder: str | Path, seed: int | None = None, trust: bool = False) -> TrainedModel:
    """Read a trained student (or any stage's network) back.

    Networks of this package and of `transformers` are rebuilt from a description that reaches no other code. A network
    of your own is a class named in `model.json`, which is imported and called only if you trust the folder.

    Args:
        folder: A run folder, or the folder of one of its stages.
        seed: Which seed of a run with several; None takes the one that is best on validation.
        trust: Whether the folder may run code that it names, as that of a network of your own: see docs/security.md.

    Raises:
        KDError: The folder holds no finished network, a damaged one, or one that only a trusted folder may bring.
    """
    from safetensors.torch import load_file

    from kd_lightning.config.trust import build_saved, trusting
    from kd_lightning.models.rebuild import from_description, is_description

    stage = find_stage(Path(folder), seed)
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
        network.eval(), tokenizer, names, task.get("max_length"), task.get("texts"), stage, predicts, images
    )


def find_stage(folder: Path, seed: int | None = None) -> Path:
    """Return the stage folder that a user means by `folder`: itself, or the run's student that is best on validation.

    Distilled and fine-tuned students come before baselines, whatever their scores. Of a run that is to have them and
    lacks one, no other student is taken in its place.

    Raises:
        ConfigError: There is no student.
        KDError: The run is unfinished.
    """
    if is_finished(folder):
        return folder
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
        instead = f"; or name on purpose one that is finished: {', '.join(map(str, found))}" if found else ""
        raise KDError(f"{folder} is unfinished ({how}): {GO_ON}{instead}")
    if not found:
        which = "" if seed is None else f" of seed {seed}"
        raise ConfigError(f"{folder} holds no finished student{which}: expected a folder that kd-train wrote")
    return max(found, key=_goodness)


GO_ON = "run the same kd-train again, and it goes on where it stopped"


def is_finished(folder: Path) -> bool:
    """Return whether a stage's training has ended."""
    return (folder / "stage.json").is_file()


def _unfinished(folder: Path, seeds: Sequence[Path], seed: int | None) -> list[Path]:
    """Return which distillations and fine-tunings a run is to have, or has begun, and does not have."""
    if (folder / "config.yaml").is_file():
        cfg = read_config(folder)
        asked = set(cfg.get("stages", ()))
        if seeds and seed is None and "seed" in cfg and "seeds" in cfg:
            known = {folder / f"seed_{cfg['seed'] + number}" for number in range(cfg["seeds"])}
            seeds = sorted({*seeds, *known})
    else:  # it is written at the end of a run
        asked = {"distill"}
    wanted = [(root / stage, stage in asked) for root in seeds for stage in reversed(TAUGHT)]
    return [place for place, is_asked in wanted if not is_finished(place) and (is_asked or place.is_dir())]


def write_config(folder: Path, text: str) -> None:
    """Write the configuration of a finished run, `config.yaml`, with a checksum in its first line."""
    write_file(folder / "config.yaml", f"{CONFIG_SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n{text}")


def read_config(folder: Path) -> dict[str, Any]:
    """Read the configuration of a finished run as plain values; nothing in it is resolved, imported or called.

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
                "again, which writes it anew; if the change is meant, remove its first line"
            )
        cfg = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise KDError(f"{path} cannot be read ({reason}): remove it and run the same kd-train again") from error
    if not isinstance(cfg, dict) or not cfg:
        raise KDError(f"{path} is no configuration of a run: remove it and run the same kd-train again")
    return {str(key): value for key, value in cfg.items()}


CONFIG_SEAL = "# sha256 of what follows: "


def run_root(stage: Path) -> Path | None:
    """Return the folder with the configuration of the run that a stage is of, if it is finished."""
    above = [stage, *stage.absolute().parents[:2]]  # RUN/teacher, RUN/seed_0/distill
    return next((folder for folder in above if (folder / "config.yaml").is_file()), None)


def teacher_stage(folder: Path) -> Path | None:
    """Return the finished teacher that `teacher.checkpoint` means by a folder: the run's, or the stage itself.

    Raises:
        KDError: It has begun and is not finished.
    """
    for place in (folder / "teacher", folder):
        if is_finished(place):
            return place
        if (place / "settings.json").is_file():
            raise KDError(f"{place} is unfinished, it has no stage.json: {GO_ON}")
    return None


def validation_score(record: dict[str, Any]) -> float:
    """Return the score of a stage's record by which its weights were selected.

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
    """Return True when this stage is finished, False when it is new or half done with these very settings.

    Raises:
        ConfigError: The folder belongs to other settings; says which differ.
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
    """Return what can be done about a stage that has begun and is damaged."""
    return f"remove {folder} and run the same kd-train again, which begins that stage anew"
