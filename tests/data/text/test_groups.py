from __future__ import annotations

import logging
import math

import pytest

from kd_lightning.data.text.groups import TextGroup, assemble_texts, connected
from kd_lightning.runtime.errors import ConfigError, DataError

PAIRS = [TextGroup((f"query {i}", f"text {i}")) for i in range(40)]


def whole(train: list[TextGroup], **given: object) -> object:
    options = {"validation": None, "test": None, "fractions": (0.1, 0.2), "split_seed": 0, "origin": "my.csv", **given}
    validation, test = options.pop("validation"), options.pop("test")
    return assemble_texts(train, validation, test, **options)  # type: ignore[arg-type]


def test_splits_are_disjoint_and_repeat() -> None:
    corpus = whole([*PAIRS, PAIRS[3]])
    sizes = [len(part) for part in (corpus.train, corpus.validation, corpus.test)]  # type: ignore[attr-defined]
    assert sizes == [28, 4, 8]
    assert corpus == whole(PAIRS)
    assert corpus != whole(PAIRS, split_seed=1)


def test_groups_with_a_text_or_a_source_in_common_stay_together() -> None:
    groups = [TextGroup((f"Query  {i // 3}", f"text {i}")) for i in range(60)]
    groups += [TextGroup((f"other {i}", f"more {i}"), source=f"s{i % 9}") for i in range(60)]
    corpus = whole(groups)
    parts = [corpus.train, corpus.validation, corpus.test]  # type: ignore[attr-defined]
    assert all(parts)
    for number, part in enumerate(parts):
        for other in parts[number + 1 :]:
            assert not {group.texts[0] for group in part} & {group.texts[0] for group in other}
            assert not {one.source for one in part if one.source} & {one.source for one in other if one.source}


def test_single_texts_are_trained_on() -> None:
    """Held out they would be neither queries nor documents; one that is a pair's text stays with the pair."""
    single = [TextGroup((f"alone {i}",)) for i in range(200)] + [TextGroup((f"query {i}",)) for i in range(40)]
    corpus = whole([*single[:100], *PAIRS, *single[100:]])
    held = [group for part in (corpus.validation, corpus.test) for group in part]  # type: ignore[attr-defined]
    assert sum(len(group.texts) > 1 for group in held) == 12
    assert not [group for group in held if group.texts[0].startswith("alone")]
    assert {group.texts[0] for group in held if len(group.texts) == 1} == {
        group.texts[0] for group in held if len(group.texts) > 1
    }
    assert len(corpus.train) == 280 - len(held)  # type: ignore[attr-defined]


def test_a_chain_connects() -> None:
    chain = [TextGroup(("a", "b")), TextGroup(("x", "y")), TextGroup(("c", "d")), TextGroup(("B ", "c"))]
    assert connected(chain).tolist() == [0, 1, 0, 0]
    assert connected([]).tolist() == []


def test_what_cannot_be_used() -> None:
    single = [TextGroup((f"text {i}",)) for i in range(40)]
    with pytest.raises(DataError, match=r"my\.csv: the validation split has no pairs"):
        whole(single)
    with pytest.raises(DataError, match="the pairs of 2 groups of texts fall into 1 that have nothing in common"):
        whole([TextGroup(("a", "b")), TextGroup(("a", "c"))])
    with pytest.raises(DataError, match="1 of 40 pairs have a score"):
        whole([*PAIRS[1:], TextGroup(("q", "t"), 0.5)])
    with pytest.raises(ConfigError, match=r"cannot hold out the fractions 0\.5, 0\.6"):
        whole(PAIRS, fractions=(0.5, 0.6))


def test_given_splits_stay_and_transfer_texts_of_them_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        corpus = whole(PAIRS, validation=PAIRS[:2], test=PAIRS[2:4], transfer=["TEXT 1", "a new one"])
    assert [group.texts for group in corpus.transfer] == [("a new one",)]  # type: ignore[attr-defined]
    assert "4 of 40 training groups have a validation or test text" in caplog.text
    assert math.isnan(corpus.transfer[0].score)  # type: ignore[attr-defined]
