"""One vector a text, near to those of texts that mean the same."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.losses.pair_labels import PairLabelsLoss
from kd_lightning.losses.term import Term
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.tasks.base import Task, refuse_nan
from kd_lightning.tasks.retrieval import K, PairScores, TeacherScores
from kd_lightning.tasks.scores import Scores, ScoreSpec
from kd_lightning.types import Batch

SHOWN = 4
"""Entries of an embedding that a table shows."""
_DESCRIPTION = re.compile(r"embedding of (\d+)(, scored pairs)?(?:, also at ([\d ]+))?")


class SentenceEmbedding(Task):
    """An embedding of D numbers, learned from pairs of texts; texts are compared by the cosine of theirs.

    Of pairs and triplets the first text is a query and the second what is to be found for it. Pairs with scores are to
    be ranked by them.

    Args:
        width: D, of the student's; a teacher's may be another.
        scored: Pairs have scores.
        widths: Further widths at which the first entries of the embedding are one, too (Matryoshka; Kusupati et al.
            2022, arXiv 2205.13147).
        pairs: Whether the training texts come in pairs, from which it is learned without a teacher.

    >>> SentenceEmbedding(384, widths=[64]).scores().names
    ['ndcg@10', 'mrr@10', 'recall@1', 'recall@10', 'ndcg@10/64']
    """

    unit, learns_from, embeds = "query", "pairs", True
    tags = ("sentence-transformers", "feature-extraction")

    def __init__(self, width: int, scored: bool = False, widths: Sequence[int] = (), pairs: bool = True) -> None:
        if wrong := [one for one in widths if not 0 < one < width]:
            raise ConfigError(f"data.widths: {wrong[0]} is not between 0 and the embedding's own width, {width}")
        self.outputs, self.scored, self.widths, self.pairs = width, scored, sorted(set(widths), reverse=True), pairs
        self.monitor = "spearman" if scored else f"ndcg@{K}"
        own = {
            f"ndcg@{K}": ScoreSpec(f"nDCG@{K}", shown="always"),
            f"mrr@{K}": ScoreSpec(f"MRR@{K}"),
            "recall@1": ScoreSpec("recall@1"),
            f"recall@{K}": ScoreSpec(f"recall@{K}"),
        }
        main = {"spearman": ScoreSpec("Spearman correlation with scores", shown="always")} if scored else own
        cut = {f"{self.monitor}/{one}": ScoreSpec(f"{main[self.monitor].title}, {one} wide") for one in self.widths}
        self.specs = {
            **main, **cut,
            "cosine_to_teacher": ScoreSpec("cosine to teacher"),
            "spearman_to_teacher": ScoreSpec("Spearman correlation with teacher"),
        }  # fmt: skip

    @property
    def settings(self) -> dict[str, Any]:
        """Its class and arguments."""
        return {
            "_target_": "kd_lightning.tasks.SentenceEmbedding", "width": self.outputs, "scored": self.scored,
            "widths": self.widths, "pairs": self.pairs,
        }  # fmt: skip

    @property
    def description(self) -> str:
        """Its name, D, and whether pairs are scored."""
        also = f", also at {' '.join(map(str, self.widths))}" if self.widths else ""
        return f"embedding of {self.outputs}{', scored pairs' if self.scored else ''}{also}"

    @classmethod
    def described(cls, description: str) -> SentenceEmbedding | None:
        """Return the task of a `description`; None where it describes another."""
        found = _DESCRIPTION.fullmatch(description)
        if found is None:
            return None
        return cls(int(found[1]), found[2] is not None, [int(one) for one in (found[3] or "").split()])

    def check_logits(self, logits: Tensor, batch: Batch) -> None:
        """Refuse a network that outputs something else than a vector for each text."""
        if logits.ndim != 2 or logits.shape[0] != len(batch["input_ids"]) or logits.shape[1] < 2:
            raise ConfigError(
                f"it outputs {list(logits.shape)} for {len(batch['input_ids'])} texts, and an embedding is a vector "
                "for each text, (B, D)"
            )

    def finished(self, checkpoint: str, sizes: Mapping[str, int]) -> nn.Module:
        """Load a sentence encoder, with the width that it has."""
        from kd_lightning.models.sentence_encoder import sentence_encoder  # imports the models of transformers

        return sentence_encoder(checkpoint)

    def pipeline(self, reads: str) -> str:
        """Return the hub's name."""
        return "sentence-similarity"

    def loss(self) -> Term:
        """Return the contrast of pairs, or of scored ones the squared error of their cosines."""
        return PairLabelsLoss(widths=self.widths)

    def terms(self) -> tuple[dict[str, Term], dict[str, float]]:
        """Return `loss` as a term.

        Raises:
            ConfigError: The training texts are single.
        """
        if not self.pairs:
            raise ConfigError(
                "the training texts are no pairs, and nothing is learned from them without a teacher: set "
                "stages=[distill] and teacher.checkpoint, or name the pairs' columns (data.positive_column)"
            )
        return super().terms()

    def scores(self) -> Scores:
        """Return nDCG, MRR and recall among the documents, or the correlation with the scores."""
        return PairScores(self.scored, self.widths)

    def fidelity(self) -> Scores:
        """Return the cosine with the teacher's embeddings, and the correlation with its similarities."""
        return TeacherScores()

    def predictions(self, logits: Tensor) -> Tensor:
        """Return embeddings of length 1."""
        return F.normalize(logits, dim=-1)

    def read(self, logits: Tensor, rows: Batch, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the embeddings, of length 1."""
        refuse_nan(logits)
        return [{"embedding": row} for row in self.predictions(logits).tolist()]

    def cells(self, record: Mapping[str, Any], names: Sequence[str] = ()) -> dict[str, str]:
        """Return how the embedding begins."""
        shown = " ".join(f"{one:+.3f}" for one in record["embedding"][:SHOWN])
        return {"embedding": f"{shown} ... ({len(record['embedding'])} numbers)"}

    def columns(self, names: Sequence[str]) -> str:
        """Return that they are the embedding's."""
        also = f" The first {' or '.join(map(str, self.widths))} of its numbers are one, too." if self.widths else ""
        return f"`logits` is the text's embedding, {self.outputs} numbers; compare two by their cosine.{also}"

    def limits(self, names: Sequence[str]) -> str:
        """Return that similar is what was paired."""
        return "Texts are similar to it as those of its training pairs are, and as its teacher has them."
