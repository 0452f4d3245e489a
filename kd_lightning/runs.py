"""The files of a run: what a stage leaves behind, and how a trained network is read back on any machine.

A stage folder (`RUN/teacher`, `RUN/seed_0/distill`) is finished once it holds `stage.json`, which is written last.
Beside it: `model.json` (how to rebuild the network), `model.safetensors` (its weights), `task.json` and `tokenizer/`
(what goes in and which classes come out), and while it trains `checkpoints/`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_lightning.errors import ConfigError, KDError
from kd_lightning.files import replacing, write_file

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from kd_lightning.data.image_store import ImageFormat
    from kd_lightning.tasks import Task


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


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one step."""
    write_file(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON, or raise `KDError` naming the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KDError(f"{path} cannot be read: {error}") from error


def digest(settings: Any) -> str:
    """Return a fingerprint of plain settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Return a fingerprint of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def network_digest(network: nn.Module) -> str:
    """Return a fingerprint of a network's weights."""
    whole = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        whole.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        whole.update(tensor.detach().cpu().float().numpy().tobytes())
    return whole.hexdigest()[:16]


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
        tokenizer.save_pretrained(folder / "tokenizer")
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in network.state_dict().items()}
    with replacing(folder / "model.safetensors") as temporary:
        save_file(state, temporary)


def load_run(folder: str | Path, seed: int | None = None) -> TrainedModel:
    """Read a trained student (or any stage's network) back.

    Networks of this package and of `transformers` are rebuilt from a description that reaches no other code. For your
    own network the class named in `model.json` is imported and called: load such runs only from people you trust.

    Args:
        folder: A run folder, or the folder of one of its stages.
        seed: Which seed of a run with several; None takes the one with the best validation accuracy.

    Raises:
        KDError: The folder holds no finished network.
    """
    from safetensors.torch import load_file

    from kd_lightning.config import build
    from kd_lightning.models.rebuild import from_description, is_description

    stage = find_stage(Path(folder), seed)
    settings = read_json(stage / "model.json")
    network = from_description(settings) if is_description(settings) else build(settings)
    network.load_state_dict(load_file(stage / "model.safetensors"))
    task = read_json(stage / "task.json")
    tokenizer = None
    if (stage / "tokenizer").is_dir():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(stage / "tokenizer"), local_files_only=True)
    images = None
    if "images" in task:
        from kd_lightning.data.image_store import ImageFormat

        images = ImageFormat(**task["images"])
    from kd_lightning.tasks import task_of

    names = task["class_names"]
    predicts = task_of(task.get("predicts", len(names)))
    return TrainedModel(
        network.eval(), tokenizer, names, task.get("max_length"), task.get("texts"), stage, predicts, images
    )


def find_stage(folder: Path, seed: int | None = None) -> Path:
    """Return the stage folder that a user means by `folder`: itself, or the run's student that is best on validation.

    Distilled and fine-tuned students come before baselines, whatever their scores.
    """
    if (folder / "stage.json").is_file():
        return folder
    seeds = sorted(folder.glob("seed_*" if seed is None else f"seed_{seed}"))
    for stages in (("finetune", "distill"), ("baseline_initialised", "baseline")):
        found = [root / stage for root in seeds for stage in stages if (root / stage / "stage.json").is_file()]
        if found:
            return max(found, key=lambda stage: validation_score(read_json(stage / "stage.json")))
    which = "" if seed is None else f" of seed {seed}"
    raise KDError(f"{folder} holds no finished student{which}: expected a folder that kd-train wrote")


def teacher_stage(folder: Path) -> Path | None:
    """Return the finished teacher that `teacher.checkpoint` means by a folder: the run's, or the stage itself."""
    return next((place for place in (folder / "teacher", folder) if (place / "stage.json").is_file()), None)


def validation_score(record: dict[str, Any]) -> float:
    """Return the score of a stage's record by which its weights were selected."""
    return float(record["validation"][record.get("selected_by", "accuracy")])


def check_fingerprint(folder: Path, fingerprint: str, settings: dict[str, Any]) -> bool:
    """Return True when this stage is finished, False when it is new or half done with these very settings.

    Raises:
        ConfigError: The folder belongs to other settings; says which differ.
    """
    finished = folder / "stage.json"
    known = finished if finished.is_file() else folder / "settings.json"
    if not known.is_file():
        return False
    record = read_json(known)
    if record["fingerprint"] == fingerprint:
        return finished.is_file()
    changed = sorted(differences(record["settings"], settings))
    raise ConfigError(
        f"{folder} holds a {'finished' if finished.is_file() else 'begun'} training with other settings "
        f"({'; '.join(changed[:3])}): choose another name=... or remove it"
    )


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Say in which keys two nested settings differ, and how."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in old.keys() | new.keys():
            found += differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return found
    return [] if json.dumps(old, default=str) == json.dumps(new, default=str) else [f"{path} was {old}, now {new}"]
