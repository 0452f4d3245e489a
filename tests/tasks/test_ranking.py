"""Scores of rankings, against loops over queries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.tasks import Ranking, task_of
from kd_lightning.tasks.evaluation import evaluate_all
from kd_lightning.tasks.list_scores import Ranked, list_scores
from kd_lightning.types import Batch, ModelOutput

SIZES = [3, 1, 14, 2, 6]
GROUP = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES)) + 40
N = len(GROUP)
_GENERATOR = torch.Generator().manual_seed(0)
SCORES = torch.randint(0, 5, (N, 1), generator=_GENERATOR).float()  # with ties
TEACHER = torch.randint(0, 5, (N, 1), generator=_GENERATOR).float()
GRADES = torch.randint(0, 3, (N,), generator=_GENERATOR).float()
BATCHES = [[7, 3, 20], [0], [*range(8, 20)], [1, 2, 4, 5, 6, *range(21, N)]]
"""Parts of queries in any order."""


def split() -> list[Batch]:
    whole = {"index": torch.arange(N), "group": GROUP, "labels": GRADES, "input_ids": torch.arange(N)}
    return [{name: value[part] for name, value in whole.items()} for part in BATCHES]


def model(scores: Tensor, batch: Batch) -> ModelOutput:
    return ModelOutput(scores[batch["input_ids"]])


def by_loops() -> list[dict[str, float]]:
    found = []
    for start, size in zip(np.cumsum([0, *SIZES[:-1]]), SIZES, strict=True):
        rows = range(start, start + size)
        order = sorted(rows, key=lambda i: (-float(SCORES[i, 0]), float(GRADES[i])))
        best = sorted((float(GRADES[i]) for i in rows), reverse=True)
        gains = [sum(g / math.log2(r + 2) for r, g in enumerate(grades[:10]))
                 for grades in ([float(GRADES[i]) for i in order], best)]  # fmt: skip
        right = [rank for rank, i in enumerate(order[:10], 1) if GRADES[i] > 0]
        own, theirs = (x[start : start + size, 0].numpy() for x in (SCORES, TEACHER))
        defined = len(set(own)) > 1 and len(set(theirs)) > 1
        tops = [set(np.flatnonzero(x == x.max())) for x in (own, theirs)]
        judged = max(best) > min(best) == 0
        found.append({
            "mrr@10": (1 / right[0] if right else 0.0) if judged else math.nan,
            "ndcg@10": gains[0] / gains[1] if judged else math.nan,
            "success@1": float(right[:1] == [1]) if judged else math.nan,
            "top_to_teacher": float(bool(tops[0] & tops[1])) if size > 1 else math.nan,
            "spearman_to_teacher": spearmanr(own, theirs).statistic if defined else math.nan,
        })  # fmt: skip
    return found


def test_scores_are_means_over_queries_whatever_the_batches() -> None:
    models = {"teacher": lambda batch: model(TEACHER, batch), "own": lambda batch: model(SCORES, batch)}
    found = evaluate_all(Ranking(), models, split(), reference="teacher")["own"]
    expected = by_loops()
    for name, value in found.scores.items():
        assert value == pytest.approx(np.nanmean([one[name] for one in expected]), rel=1e-5), name
        sums = found.units[name]
        values = [float(t / w) if w else math.nan for t, w in zip(sums.totals, sums.weights, strict=True)]
        counts = "top_to_teacher" if name.endswith("to_teacher") else "mrr@10"
        of_units = [one[name] for one in expected if not math.isnan(one[counts])]
        assert values == pytest.approx(of_units, rel=1e-5, nan_ok=True)
    assert found.scores.keys() == Ranking.specs.keys()
    assert found.examples == N


def test_a_network_that_scores_all_alike_gains_nothing_from_the_order() -> None:
    """Relevant documents often come first in a file."""
    ranked, grades = Ranked(torch.zeros(4, dtype=torch.long)), torch.tensor([2.0, 1.0, 0.0, 0.0])
    found = {name: value for name, (value, _) in list_scores(ranked, torch.ones(4), grades).items()}
    assert found["mrr@10"].item() == pytest.approx(1 / 3)
    worst = (1 / math.log2(4) + 2 / math.log2(5)) / (2 + 1 / math.log2(3))
    assert found["ndcg@10"].item() == pytest.approx(worst)
    assert found["success@1"].item() == 0


def test_gains_are_grades_and_not_their_powers() -> None:
    ranked, grades = Ranked(torch.zeros(3, dtype=torch.long)), torch.tensor([3.0, 1.0, 0.0])
    found = list_scores(ranked, torch.tensor([1.0, 2.0, 0.0]), grades)
    assert found["ndcg@10"][0].item() == pytest.approx((1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3)))
    assert found["mrr@10"][0].item() == 1


def test_queries_with_nothing_to_rank_do_not_count() -> None:
    """One document, none that is relevant, or all of them, alike or not: any network ranks them as well as can be."""
    grades = [[2.0], [1.0, 1.0], [2.0, 1.0], [0.0, 0.0], [0.0, 3.0]]
    group = torch.arange(5).repeat_interleave(torch.tensor([len(one) for one in grades]))
    labels = torch.tensor([grade for one in grades for grade in one])
    batch = {"index": torch.arange(9), "group": group, "labels": labels, "input_ids": torch.arange(9)}
    ranks_last = {"worst": lambda given: ModelOutput(-given["labels"][:, None])}
    found = evaluate_all(Ranking(), ranks_last, [batch])["worst"]
    assert found.scores == pytest.approx({"mrr@10": 0.5, "ndcg@10": 1 / math.log2(3), "success@1": 0.0})
    assert found.units["mrr@10"].weights.tolist() == [1]
    alike = evaluate_all(Ranking(), ranks_last | {"teacher": ranks_last["worst"]}, [batch], reference="teacher")
    assert alike["worst"].units["top_to_teacher"].weights.tolist() == [1, 1, 1, 1]


def test_nan_is_no_score() -> None:
    broken = SCORES.clone()
    broken[4] = torch.nan
    found = evaluate_all(Ranking(), {"own": lambda batch: model(broken, batch)}, split())["own"]
    assert all(map(math.isnan, found.scores.values()))
    with pytest.raises(KDError, match="predicts NaN"):
        Ranking().read(broken, {}, [])
    with pytest.raises(TypeError, match="do not add up"):
        Ranking().scores().states()


def test_descriptions_and_records() -> None:
    assert isinstance(task_of(Ranking().description), Ranking)
    (record,) = Ranking().read(torch.tensor([[2.5]]), {}, ["score"])
    assert (record, Ranking().cells(record)) == ({"score": 2.5}, {"score": "2.500"})
    assert Ranking().pipeline("text") == "text-ranking"
    with pytest.raises(ConfigError, match=r"logits of shape \[3, 2\]"):
        Ranking().check_logits(torch.zeros(3, 2), {})
