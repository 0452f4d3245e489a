from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning.tasks.entities import EntityScores, Scheme, Span, spans_of, tag_problem, tags_from, tags_of
from kd_lightning.types import IGNORE

TAGS = ["O", *(f"{prefix}-{kind}" for kind in ("LOC", "PER") for prefix in "BIES")]
TEXTS = st.lists(st.lists(st.sampled_from(TAGS), min_size=1, max_size=8), min_size=1, max_size=6)


def reference(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The rules of conlleval and of seqeval's default mode, as they are written there: two tables of cases."""
    found = set()
    begin, last, last_kind = 0, "O", "_"
    for i, tag in enumerate([*tags, "O"]):
        prefix, kind = tag[0], tag[1:].split("-", maxsplit=1)[-1] or "_"
        ends = last in "ES" or (last, prefix) in {(a, b) for a in "BI" for b in "BSO"}
        starts = prefix in "BS" or (last, prefix) in {(a, b) for a in "ESO" for b in "EI"}
        if ends or (last != "O" and last_kind != kind):
            found.add((last_kind, begin, i))
        if starts or (prefix != "O" and last_kind != kind):
            begin = i
        last, last_kind = prefix, kind
    return {(kind, start, stop) for kind, start, stop in found if kind != "_"}


def as_batch(predicted: list[list[str]], expected: list[list[str]], tags: list[str]) -> tuple[Tensor, Tensor]:
    """Texts as logits `(B, L, C)` and labels `(B, L)`, with a place that does not count before each word."""
    width = 2 * max(map(len, expected))
    logits, labels = torch.randn(len(expected), width, len(tags)), torch.full((len(expected), width), IGNORE)
    for row, (said, told) in enumerate(zip(predicted, expected, strict=True)):
        for i, (one, other) in enumerate(zip(said, told, strict=True)):
            logits[row, 2 * i + 1] = torch.eye(len(tags))[tags.index(one)]
            labels[row, 2 * i + 1] = tags.index(other)
    return logits, labels


def scored(predicted: list[list[str]], expected: list[list[str]], tags: list[str] = TAGS) -> dict[str, float]:
    logits, labels = as_batch(predicted, expected, tags)
    metric = EntityScores(tags)
    for row in range(len(labels)):  # streamed
        metric.update(logits[row : row + 1], labels[row : row + 1])
    return {name: float(value) for name, value in metric.compute().items() if "/" not in name}


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_spans_are_those_of_seqevals_rules(texts: list[list[str]]) -> None:
    for tags in texts:
        assert {(span.type, span.start, span.stop) for span in spans_of(tags)} == reference(tags)


@settings(max_examples=50, deadline=None)
@given(TEXTS, st.randoms(use_true_random=False))
def test_scores_are_those_of_sets_of_spans(texts: list[list[str]], random: object) -> None:
    predicted = [[random.choice([tag, *TAGS]) for tag in tags] for tags in texts]  # type: ignore[attr-defined]
    said, told = (
        {(i, *span) for i, tags in enumerate(part) for span in reference(tags)} for part in (predicted, texts)
    )
    right = len(said & told)
    expected = {
        "precision": right / max(len(said), 1),
        "recall": right / max(len(told), 1),
        "f1": 2 * right / max(len(said) + len(told), 1),
    }
    assert scored(predicted, texts) == pytest.approx(expected)


CASES = [
    # a table worked out by hand: predicted, expected, right / predicted / expected entities
    ("B-PER I-PER O", "B-PER I-PER O", (1, 1, 1)),
    ("B-PER O O", "B-PER I-PER O", (0, 1, 1)),  # a span that ends early is wrong as a whole
    ("I-PER I-PER O", "B-PER I-PER O", (1, 1, 1)),  # I without B begins an entity
    ("B-PER I-LOC O", "B-PER I-PER O", (0, 2, 1)),  # a change of type ends it
    ("B-PER B-PER O", "B-PER I-PER O", (0, 2, 1)),
    ("B-LOC I-LOC O", "B-PER I-PER O", (0, 1, 1)),
    ("S-PER O O", "B-PER O O", (1, 1, 1)),
    ("B-PER E-PER I-PER", "B-PER E-PER S-PER", (2, 2, 2)),  # what follows an E is another entity
    ("O O O", "O O O", (0, 0, 0)),
    ("O O O", "S-LOC O S-PER", (0, 0, 2)),
]


@pytest.mark.parametrize(("predicted", "expected", "counts"), CASES)
def test_counts_worked_out_by_hand(predicted: str, expected: str, counts: tuple[int, int, int]) -> None:
    metric = EntityScores(TAGS)
    metric.update(*as_batch([predicted.split()], [expected.split()], TAGS))
    assert (metric.correct.sum(), metric.predicted.sum(), metric.expected.sum()) == counts


@pytest.mark.skipif(importlib.util.find_spec("seqeval") is None, reason="seqeval is not installed")
@settings(max_examples=25, deadline=None)
@given(TEXTS)
def test_scores_are_seqevals(texts: list[list[str]]) -> None:
    from seqeval.metrics import f1_score, precision_score, recall_score

    predicted = [list(reversed(tags)) for tags in texts]
    functions = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
    expected = {name: function(texts, predicted, zero_division=0) for name, function in functions.items()}
    assert scored(predicted, texts) == pytest.approx(expected)


def test_every_type_has_its_f1() -> None:
    metric = EntityScores(TAGS)
    metric.update(*as_batch([["S-PER", "O", "S-LOC"]], [["S-PER", "S-PER", "O"]], TAGS))
    found = {name: float(value) for name, value in metric.compute().items()}
    assert found == pytest.approx({"f1": 0.5, "precision": 0.5, "recall": 0.5, "LOC/f1": 0.0, "PER/f1": 2 / 3})


def test_a_row_ends_what_stands_at_its_end() -> None:
    assert scored([["B-PER"], ["I-PER"]], [["B-PER"], ["B-PER"]])["f1"] == 1.0


def test_an_entity_across_windows_counts_once() -> None:
    """Windows of two texts, in batches of any order: their tags are joined before entities are looked for."""
    logits, labels = as_batch([["B-PER", "I-PER"]] * 4, [["B-PER", "I-PER"]] * 4, TAGS)
    labels[labels == TAGS.index("B-PER")] = TAGS.index("I-PER")  # no entity begins anew
    logits[..., TAGS.index("I-PER")] += 2
    metric = EntityScores(TAGS)
    document, index = torch.tensor([7, -1, 3, 7]), torch.tensor([11, 5, 4, 10])
    for rows in ([3, 1], [2], [0]):
        metric.update(logits[rows], labels[rows], document[rows], index[rows])
    assert metric.compute()["f1"] == 1.0
    assert metric.expected.sum() == 3


def test_a_nan_that_counts_is_no_score() -> None:
    logits, labels = as_batch([["S-PER", "O"]], [["S-PER", "O"]], TAGS)
    logits[0, 0] = torch.nan  # no word
    metric = EntityScores(TAGS)
    metric.update(logits, labels)
    assert metric.compute()["f1"] == 1.0
    logits[0, 1] = torch.nan
    metric.update(logits, labels)
    assert all(value.isnan() for value in metric.compute().values())


@pytest.mark.parametrize("scheme", ["bio", "bioes", "io"])
def test_spans_are_written_in_every_scheme(scheme: Scheme) -> None:
    spans = [Span(0, 1, "PER"), Span(2, 5, "LOC"), Span(6, 8, "PER")]
    tags = tags_from(spans, 8, scheme)
    assert spans_of(tags) == spans
    assert tag_problem(tags, scheme) is None
    assert set(tags) <= set(tags_of(["PER", "LOC"], scheme))


BROKEN: list[tuple[str, Scheme, int, str]] = [
    ("O I-PER", "bio", 1, "I-PER follows O: an entity begins with B-PER in BIO"),
    ("B-LOC I-PER", "bio", 1, "I-PER follows B-LOC: an entity begins with B-PER"),
    ("O E-PER", "bio", 1, "'E-PER' is no tag of BIO: expected O, B-TYPE, I-TYPE"),
    ("B-PER O", "bioes", 1, "O follows B-PER: an entity ends with E-PER in BIOES, and a single word is S-PER"),
    ("O B-PER", "bioes", 1, "the end follows B-PER: an entity ends with E-PER"),
    ("S-PER I-PER E-PER", "bioes", 1, "I-PER follows S-PER: an entity begins with B-PER in BIOES"),
    ("B-PER", "io", 0, "'B-PER' is no tag of IO: expected O, I-TYPE"),
    ("O PER", "bio", 1, "'PER' is no tag of BIO"),
    ("O B-", "bio", 1, "'B-' is no tag of BIO"),
]


@pytest.mark.parametrize(("tags", "scheme", "place", "problem"), BROKEN)
def test_what_breaks_a_scheme_is_named_with_its_place(tags: str, scheme: Scheme, place: int, problem: str) -> None:
    found = tag_problem(tags.split(), scheme)
    assert found is not None
    assert found[0] == place
    assert problem in found[1]
