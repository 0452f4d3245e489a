"""One tag a word: named entities, personal data, whatever else is marked as runs of words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.losses.cross_entropy import CrossEntropyLoss
from kd_lightning.losses.term import Term
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.tasks.base import Task, refuse_nan
from kd_lightning.tasks.details import Details, TokenDetails
from kd_lightning.tasks.entities import EntityScores, spans_of, split_tag
from kd_lightning.tasks.metrics import Accuracy, Agreement, CrossEntropy, TeacherStudentKL
from kd_lightning.tasks.scores import Scores, ScoreSpec
from kd_lightning.types import IGNORE, Batch


class TokenClassification(Task):
    """A tag for each word, predicted at its first token; entities are runs of words that tags mark.

    Args:
        tags: In the order of the classes: O, and such as B-PER and I-PER.

    >>> task = TokenClassification(["O", "B-PER", "I-PER"])
    >>> logits = 5 * torch.eye(3)[torch.tensor([[0, 1, 2]])]
    >>> task.read(logits, {"keep": torch.ones(1, 3, dtype=torch.bool)}, task.class_names)
    [{'entities': [{'type': 'PER', 'start': 1, 'stop': 3, 'score': 0.9867}]}]
    """

    monitor, per_token = "entity_f1", True
    tags = ("token-classification",)

    def __init__(self, tags: Sequence[str]) -> None:
        self.class_names = list(tags)
        self.outputs = self.classes = len(self.class_names)
        self.specs = {
            "entity_f1": ScoreSpec("entity F1", shown="always"),
            "entity_precision": ScoreSpec("entity precision"),
            "entity_recall": ScoreSpec("entity recall"),
            "token_accuracy": ScoreSpec("token accuracy"),
            "agreement": ScoreSpec("agreement with teacher"),
            "kl_to_teacher": ScoreSpec("KL to teacher, nats", "min"),
            "cross_entropy": ScoreSpec("cross-entropy, nats", "min", shown="never"),
            **{f"{kind}/f1": ScoreSpec(f"{kind}: F1") for kind in self.types},
        }

    @property
    def settings(self) -> dict[str, Any]:
        """Its class and tags."""
        return {"_target_": "kd_lightning.tasks.TokenClassification", "tags": self.class_names}

    @property
    def description(self) -> list[str]:
        """Its tags."""
        return self.class_names

    @property
    def types(self) -> list[str]:
        """The types of entities."""
        return sorted({parts[1] for tag in self.class_names if (parts := split_tag(tag)) and parts[1]})

    def check_logits(self, logits: Tensor, batch: Batch) -> None:
        """Refuse a network that predicts something else."""
        expected = [*batch["input_ids"].shape, self.outputs]
        if list(logits.shape) != expected:
            raise ConfigError(
                f"it predicts logits of shape {list(logits.shape)}, and the data have tags for {expected}: one a "
                "token; bilstm, transformer and hf can give that, a network of your own with logits (B, L, C)"
            )

    def finished(self, checkpoint: str, sizes: Mapping[str, int]) -> nn.Module:
        """Load a token classifier of Hugging Face."""
        from kd_lightning.models.hf import finished  # imports the models of transformers

        return finished(checkpoint, self.outputs, sizes.get("pad_token_id"), per_token=True)

    def pipeline(self, reads: str) -> str:
        """Return the hub's name."""
        return "token-classification"

    def loss(self) -> Term:
        """Return the cross-entropy."""
        return CrossEntropyLoss()

    def scores(self) -> Scores:
        """Return F1, precision and recall of entities, each type's F1, and scores of single tags."""
        return _TagScores(self.class_names)

    def fidelity(self) -> Scores:
        """Return agreement with the teacher, and the divergence from it, over tokens."""
        return Scores({"agreement": Agreement(), "kl_to_teacher": TeacherStudentKL()})

    def details(self) -> dict[str, Details]:
        """Return which tag is taken for which, and calibration, over words."""
        return {"": TokenDetails(self.outputs)}

    def predictions(self, logits: Tensor) -> Tensor:
        """Return the tags' probabilities."""
        return logits.softmax(-1)

    def read(self, logits: Tensor, rows: Batch, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the entities of each text, by the numbers of their first word and of the one after the last.

        An entity's score is the mean probability of its words' tags. `keep` of the rows has one token a word.
        """
        found = []
        for row, keep in zip(logits, rows["keep"], strict=True):
            refuse_nan(row[keep])
            chances, codes = row[keep].softmax(-1).max(-1)
            spans = spans_of([names[code] for code in codes.tolist()])
            found.append([
                {"type": span.type, "start": span.start, "stop": span.stop,
                 "score": round(float(chances[span.start : span.stop].mean()), 4)}
                for span in spans
            ])  # fmt: skip
        return [{"entities": entities} for entities in found]

    def cells(self, record: Mapping[str, Any], names: Sequence[str] = ()) -> dict[str, str]:
        """Return the entities in a row."""
        entities = (f"{one['text']} ({one['type']} {one['score']:.3f})" for one in record["entities"])
        return {"entities": ", ".join(entities)}

    def columns(self, names: Sequence[str]) -> str:
        """Return that they are the tags', for each token."""
        return (
            "`logits` has a row for each token and a column for each tag; `export.json` has their names. A word's tag "
            "is that of its first token."
        )

    def limits(self, names: Sequence[str]) -> str:
        """Return that it knows its types of entities only."""
        return f"It finds {', '.join(self.types)} and nothing else."

    def chance_score(self, labels: Tensor) -> float:
        """Return the F1 of the best of the tags that mark each word as an entity of its own."""
        metric = EntityScores(self.class_names)
        found = [0.0]
        for code, tag in enumerate(self.class_names):
            if tag[0] in "BS":
                metric.reset()
                one_hot = torch.eye(self.outputs)[torch.full((1, len(labels)), code)]
                metric.update(one_hot, labels.reshape(1, -1))
                found.append(float(metric.compute()["f1"]))
        return max(found)


class _TagScores(Scores):
    """Scores of entities and of single tags, at the first token of each word.

    Args:
        tags: The tag of each class.
    """

    def __init__(self, tags: Sequence[str]) -> None:
        super().__init__({"token_accuracy": Accuracy(len(tags)), "cross_entropy": CrossEntropy()})
        self.entities = EntityScores(tags)

    @property
    def names(self) -> list[str]:
        """Of the scores."""
        whole = [f"entity_{name}" for name in ("f1", "precision", "recall")]
        return [*whole, *super().names, *(f"{kind}/f1" for kind in self.entities.types)]

    def update(self, logits: Tensor, against: Tensor, rows: Batch) -> None:
        """Add a batch."""
        begins = rows.get("begins", rows["keep"])
        super().update(logits, against, {"keep": begins})
        labels = against.masked_fill(~begins, IGNORE)
        self.entities.update(logits, labels, rows.get("window_of"), rows.get("index"))

    def compute(self) -> dict[str, Tensor]:
        """Return the scores of all that was added, in all processes."""
        found: dict[str, Tensor] = self.entities.compute()
        whole = {f"entity_{name}": value for name, value in found.items() if "/" not in name}
        return whole | super().compute() | {name: value for name, value in found.items() if "/" in name}

    def states(self) -> Tensor:
        """Return what was added as numbers in line; windows are counted for what was added of their texts."""
        self.entities.settle()
        return super().states()
