"""How well a document fits a query: one score for each pair, by which a query's documents are ranked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kd_lightning.losses.list_labels import ListLabelsLoss
from kd_lightning.losses.term import Term
from kd_lightning.tasks.base import Task, refuse_nan
from kd_lightning.tasks.list_scores import RankingScores
from kd_lightning.tasks.retrieval import K
from kd_lightning.tasks.scores import Scores, ScoreSpec
from kd_lightning.types import Batch

DESCRIPTION = "ranking"


class Ranking(Task):
    """A score for a query and a document; labels are grades, 0 where the document is irrelevant.

    >>> Ranking().scores().names
    ['mrr@10', 'ndcg@10', 'success@1']
    """

    monitor, outputs, unit, learns_from = f"mrr@{K}", 1, "query", "grades"
    tags, problem_type = ("text-ranking",), "regression"
    specs: Mapping[str, ScoreSpec] = {
        f"mrr@{K}": ScoreSpec(f"MRR@{K}", shown="always"),
        f"ndcg@{K}": ScoreSpec(f"nDCG@{K}", shown="always"),
        "success@1": ScoreSpec("relevant document on top"),
        "spearman_to_teacher": ScoreSpec("Spearman correlation with teacher, by query"),
        "top_to_teacher": ScoreSpec("teacher's document on top"),
    }

    @property
    def settings(self) -> dict[str, Any]:
        """Its class."""
        return {"_target_": "kd_lightning.tasks.Ranking"}

    @property
    def description(self) -> str:
        """Its name."""
        return DESCRIPTION

    def pipeline(self, reads: str) -> str:
        """Return the hub's name."""
        return "text-ranking"

    def loss(self) -> Term:
        """Return the cross-entropy of a query's documents with their grades."""
        return ListLabelsLoss()

    def scores(self) -> Scores:
        """Return MRR, nDCG, and whether a relevant document is on top."""
        return RankingScores([f"mrr@{K}", f"ndcg@{K}", "success@1"], graded=True)

    def fidelity(self) -> Scores:
        """Return the rank correlation with the teacher, and whether the same document is on top."""
        return RankingScores(["spearman_to_teacher", "top_to_teacher"], graded=False)

    def read(self, logits: Tensor, rows: Batch, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the score of each pair."""
        refuse_nan(logits)
        return [{"score": score} for score in logits.reshape(-1).tolist()]

    def cells(self, record: Mapping[str, Any], names: Sequence[str] = ()) -> dict[str, str]:
        """Return the score."""
        return {"score": f"{record['score']:.3f}"}

    def columns(self, names: Sequence[str]) -> str:
        """Return that there is one, by which documents are ranked."""
        return "`logits` has one column, the score of a query and a document: the higher, the better they fit."

    def limits(self, names: Sequence[str]) -> str:
        """Return that scores compare documents of one query."""
        return "Scores are in no fixed range and compare the documents of one query, not those of several."
