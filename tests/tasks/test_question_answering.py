"""Question answering: SQuAD's rules on a table of cases, spans of windows, and scores of questions."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.tasks import QuestionAnswering, task_of
from kd_lightning.tasks.evaluation import evaluate_all
from kd_lightning.tasks.spans import Contexts, best_spans, decided, exact_match, normalised, overlap_f1
from kd_lightning.types import IGNORE, Batch, ModelOutput

CASES: list[tuple[str, list[str], float, float]] = [
    ("Denver Broncos", ["Denver Broncos"], 1, 1),
    ("the denver broncos!", ["Denver Broncos"], 1, 1),  # case, articles, punctuation
    ("Denver  Broncos\n", ["The Denver Broncos."], 1, 1),  # white space
    ("the Broncos", ["Denver Broncos"], 0, 2 / 3),  # 1 of 1, 1 of 2
    ("in the year 1066", ["1066", "year 1066"], 0, 4 / 5),  # the better of the two: 2 of 3, 2 of 2
    ("U.S.A.", ["USA"], 1, 1),  # a mark disappears, it is no space
    ("twenty-one", ["twenty one"], 0, 0),
    ("to be or not to be", ["to be"], 0, 2 * 2 / 8),  # a word counts as often as both have it
    ("another", ["other"], 0, 0),  # an article is a word of its own
    ("", [], 1, 1),  # no answer, rightly
    ("", ["Oslo"], 0, 0),
    ("Oslo", [], 0, 0),
    ("the", ["Oslo"], 0, 0),  # nothing is left of it
    ("The", [], 1, 1),
    ("The", ["a"], 1, 1),  # nothing is left of the answer either: as if there were none
    ("Zürich", ["ZÜRICH"], 1, 1),
    ("a b c", ["c b a"], 0, 1),  # a bag of words; "a" is an article
]


@pytest.mark.parametrize(("predicted", "known", "exact", "f1"), CASES)
def test_squads_rules(predicted: str, known: list[str], exact: float, f1: float) -> None:
    assert exact_match(predicted, known) == exact
    assert overlap_f1(predicted, known) == pytest.approx(f1)


def test_normalised_texts_are_words_and_spaces() -> None:
    assert normalised("  An  (old) Theatre, the best; a-b ") == "old theatre best ab"


def random_windows(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(6, 12, generator=generator) < 2  # all
    for row in range(6):
        keep[row, 1 : 3 + row % 3] = False  # the question
        keep[row, 12 - row :] = False  # padding
    keep[5, 1:] = False  # no context at all
    return 3 * torch.randn(6, 12, 2, generator=generator), keep


@pytest.mark.parametrize("most", [1, 3, 30])
def test_the_best_span_is_that_of_all_pairs(most: int) -> None:
    logits, keep = random_windows()
    logits[~keep] = 50.0
    best = best_spans(logits, keep, most)
    for row in range(5):
        places = [i for i in range(1, 12) if keep[row, i]]
        both = [(i, j) for i in places for j in places if i <= j < i + most]
        pairs = {(i, j): float(logits[row, i, 0] + logits[row, j, 1]) for i, j in both}
        expected = max(pairs, key=lambda pair: pairs[pair])
        assert (int(best.start[row]), int(best.end[row])) == expected
        assert float(best.score[row]) == pytest.approx(pairs[expected])
        start, end = (logits[row, keep[row], side].softmax(0) for side in (0, 1))
        order = keep[row].nonzero()[:, 0].tolist()
        chance = start[order.index(expected[0])] * end[order.index(expected[1])]
        assert float(best.chance[row]) == pytest.approx(float(chance), rel=1e-4)
        assert float(best.none_chance[row]) == pytest.approx(float(start[0] * end[0]), rel=1e-4)
    assert float(best.score[5]) == -torch.inf
    assert float(best.none[5]) == pytest.approx(float(logits[5, 0].sum()))


def test_what_is_not_kept_reaches_no_span_and_a_nan_that_is_does() -> None:
    logits, keep = random_windows()
    hostile = logits.masked_fill(~keep.unsqueeze(2), torch.nan)
    for one, other in zip(best_spans(logits, keep, 5), best_spans(hostile, keep, 5), strict=True):
        assert torch.equal(one, other)
    hostile[2, 6, 1] = torch.nan
    assert best_spans(hostile, keep, 5).score.isnan().tolist() == [False, False, True, False, False, False]


def test_large_logits_are_a_span_and_an_infinite_one_is_none() -> None:
    keep = torch.ones(1, 4, dtype=torch.bool)
    logits = torch.zeros(1, 4, 2)
    logits[0, 2] = 3e38  # float32 has no sum of both
    best = best_spans(logits, keep, 3)
    assert (int(best.start), int(best.end), float(best.chance)) == (2, 2, 1.0)
    assert decided(torch.tensor([0]), best.score, best.none, True)[2].tolist() == [True]
    logits[0, 2, 0] = torch.inf
    best = best_spans(logits, keep, 3)
    assert best.score.isnan()
    assert best.none.isnan()


def test_windows_are_merged_by_score_and_the_least_none() -> None:
    question = torch.tensor([3, 1, 3, 1, 2])
    score, none = torch.tensor([1.0, 5.0, 4.0, 2.0, -torch.inf]), torch.tensor([9.0, 6.0, 3.0, 7.0, 0.0])
    assert [x.tolist() for x in decided(question, score, none, True)] == [[1, 2, 3], [1, 4, 2], [False, False, True]]
    assert decided(question, score, none, False)[2].tolist() == [True, False, True]


CONTEXTS = ["Ada lives in Oslo", "Lin lives in New York"]


def contexts() -> Contexts:
    """Windows of [CLS] and words; question 0 is one window, 1 has two that share a word, 2 is unknown."""
    words = [[(0, 3), (4, 9), (10, 12), (13, 17)], [(0, 3), (4, 9), (10, 12)], [(10, 12), (13, 16), (17, 21)]]
    words.append(words[0])
    chars = np.array([pair for window in words for pair in [(0, 0), *window]], np.int32)
    offsets = np.cumsum([0, *(len(window) + 1 for window in words)])
    return Contexts([CONTEXTS[0], CONTEXTS[1], CONTEXTS[0]], [["Oslo"], ["New York"], None], chars, offsets)


def batch() -> Batch:
    keep = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    labels = torch.where(keep, 0, IGNORE)
    labels[0, 4], labels[1, 0], labels[2, 2], labels[2, 3] = 3, 3, 1, 2
    labels[3] = IGNORE
    return {
        "input_ids": torch.ones_like(labels), "keep": keep, "labels": labels, "index": torch.arange(4),
        "question": torch.tensor([0, 1, 1, 2]),
    }  # fmt: skip


def spans(*places: tuple[int, int]) -> Tensor:
    """Logits of windows that each have one span."""
    found = torch.zeros(len(places), 5, 2)
    for row, (start, end) in enumerate(places):
        found[row, start, 0], found[row, end, 1] = 4.0 + row, 4.0 + row
    return found


RIGHT = ((4, 4), (0, 0), (2, 3), (1, 1))


def task(may_be_none: bool = True, texts: Contexts | None = None) -> QuestionAnswering:
    return QuestionAnswering(may_be_none, contexts=texts or contexts())


def scored(own: QuestionAnswering, logits: Tensor) -> dict[str, float]:
    scores, rows = own.scores(), batch()
    for part in (slice(0, 2), slice(2, 4)):  # a question's windows may be in two batches
        scores.update(logits[part], rows["labels"][part], {name: x[part] for name, x in rows.items()})
    return {name: float(value) for name, value in scores.compute().items()}


def test_scores_are_of_questions_and_all_their_windows() -> None:
    found = scored(task(False), spans(*RIGHT))
    assert found == {"exact_match": 1.0, "f1": 1.0}
    found = scored(task(False), spans((4, 4), (1, 1), (3, 3), (1, 1)))  # "York", not "New York"
    assert found["exact_match"] == 0.5
    assert found["f1"] == pytest.approx((1 + 2 / 3) / 2)
    scores, rows = task(False).scores(), batch()
    scores.update(spans(*RIGHT), rows["labels"], rows)
    scores.compute()
    values = scores.values()
    assert values is not None
    assert values.units.tolist() == [0, 1]  # nobody knows the third
    with pytest.raises(TypeError, match="do not add up"):
        scores.states()


def test_questions_may_have_no_answer() -> None:
    texts = contexts()
    texts = Contexts(texts.texts, [["Oslo"], [], None], texts.chars, texts.offsets)
    own = task(True, texts)
    assert scored(own, spans((4, 4), (0, 0), (0, 0), (1, 1))) == {
        "exact_match": 1.0, "f1": 1.0, "has_answer/f1": 1.0, "no_answer/f1": 1.0,
    }  # fmt: skip
    assert scored(own, spans((0, 0), (0, 0), (2, 2), (1, 1)))["no_answer/f1"] == 0.0
    broken = spans(*RIGHT)
    broken[2, 1, 0] = torch.nan
    assert all(np.isnan(value) for value in scored(own, broken).values())


def test_evaluation_streams_with_a_teacher() -> None:
    own, rows = task(), batch()

    def teacher(given: Batch) -> ModelOutput:
        return ModelOutput(spans(*RIGHT))

    def student(given: Batch) -> ModelOutput:
        return ModelOutput(spans((4, 4), (0, 0), (2, 3), (2, 2)) * 2)

    found = evaluate_all(own, {"teacher": teacher, "student": student}, [rows], reference="teacher")
    assert found["student"].scores["f1"] == found["teacher"].scores["f1"] == 1.0
    assert found["student"].scores["agreement"] == pytest.approx(0.75)
    assert found["student"].scores["kl_to_teacher"] > 0
    assert found["teacher"].scores["kl_to_teacher"] == pytest.approx(0, abs=1e-6)
    assert found["student"].units["f1"].totals.tolist() == [1.0, 1.0]
    assert set(found["student"].scores) <= {*own.specs}
    same = copy.deepcopy(own.scores())
    assert same.contexts is own.contexts  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("may_be_none", [True, False])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_agrees_with_nothing(may_be_none: bool, side: int) -> None:
    given = [spans(*[(0, 0)] * 4) for _ in range(2)]
    given[side][1, 2] = torch.nan
    fidelity = task(may_be_none).fidelity()
    fidelity.update(*given, batch())
    assert all(value.isnan() for value in fidelity.compute().values())


def test_white_space_before_an_answer_is_no_part_of_it() -> None:
    chars = np.array([(0, 0), (0, 3), (3, 9), (9, 12), (12, 17)], np.int32)  # as tokens of bytes have it
    own = Contexts(CONTEXTS[:1], [["Oslo"]], chars, np.array([0, 5]))
    assert own.characters(0, 0, 4, 4) == (13, 17)
    assert own.characters(0, 0, 2, 3) == (4, 12)


def test_scores_need_the_texts() -> None:
    own, rows = QuestionAnswering(), batch()
    assert not own.complete
    scores = own.scores()
    scores.update(spans(*RIGHT), rows["labels"], rows)
    with pytest.raises(ConfigError, match="use the `task` of the data"):
        scores.compute()


def test_records_are_windows_and_nan_is_refused() -> None:
    rows = batch()
    records = task().read(spans(*RIGHT), rows, ["start", "end"])
    assert [(one["start"], one["end"]) for one in records] == [(4, 4), (1, 1), (2, 3), (1, 1)]
    broken = spans(*RIGHT)
    broken[1, 4] = torch.nan  # padding
    task().read(broken, rows, [])
    broken[1, 2] = torch.nan
    with pytest.raises(KDError, match="predicts NaN"):
        task().read(broken, rows, [])


def test_logits_of_other_shapes_are_refused() -> None:
    task().check_logits(torch.zeros(4, 5, 2), batch())
    for wrong in (torch.zeros(4, 2), torch.zeros(4, 5, 3)):
        with pytest.raises(ConfigError, match=r"the data need \[4, 5, 2\]: starts and ends of spans"):
            task().check_logits(wrong, batch())


@pytest.mark.parametrize("may_be_none", [True, False])
def test_a_task_is_made_again_of_its_description(may_be_none: bool) -> None:
    again = task_of(QuestionAnswering(may_be_none, 12).description)
    assert isinstance(again, QuestionAnswering)
    assert again.settings == QuestionAnswering(may_be_none, 12).settings
