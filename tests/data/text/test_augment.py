from __future__ import annotations

import pytest

from kd_lightning.data.text.augment import MASK, Views, make_view, words

TEXTS = [f"a sentence number {i} that goes on for a good many words, as they do" for i in range(300)]
CHINESE = "这部电影的画面很美，但是故事太长了"


def test_words_of_chinese_are_characters() -> None:
    assert words("很 good电影!") == [(False, "很"), (True, "good"), (False, "电"), (False, "影"), (False, "!")]
    assert "".join((" " if space else "") + word for space, word in words(CHINESE)) == CHINESE


def test_a_view_is_a_function_of_its_arguments() -> None:
    forward = [make_view(text, i, 2, 7) for i, text in enumerate(TEXTS)]
    backward = [make_view(TEXTS[i], i, 2, 7) for i in reversed(range(len(TEXTS)))]
    assert forward == backward[::-1]  # in another process: tests/data/text/test_substitutes.py


@pytest.mark.parametrize("change", [{"index": 1}, {"view": 1}, {"seed": 1}])
def test_other_views_differ(change: dict[str, int]) -> None:
    same = {"index": 0, "view": 0, "seed": 0}
    differing = sum(make_view(text, **same) != make_view(text, **(same | change)) for text in TEXTS)
    assert differing > 0.8 * len(TEXTS)


def test_frequencies_are_those_asked_for() -> None:
    views = [make_view(text, i, 0, 0, mask_probability=0.2, ngram_probability=0.0) for i, text in enumerate(TEXTS)]
    masked = sum(view.count(MASK) for view in views) / sum(len(text.split()) for text in TEXTS)
    assert masked == pytest.approx(0.2, abs=0.03)
    views = [make_view(text, i, 0, 0, mask_probability=0.0, ngram_probability=0.25) for i, text in enumerate(TEXTS)]
    grams = [view for view, text in zip(views, TEXTS, strict=True) if view != text]
    assert len(grams) / len(TEXTS) == pytest.approx(0.25, abs=0.08)
    assert {len(gram.split()) for gram in grams} == {1, 2, 3, 4, 5}
    assert all(gram in text for gram in grams for text in [next(text for text in TEXTS if gram in text)])


@pytest.mark.parametrize("text", ["word", "two words", "好", CHINESE, "  spaced   out  "])
@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_a_view_is_never_empty_nor_all_masks(text: str, probability: float) -> None:
    for view in range(50):
        made = make_view(text, 0, view, 0, mask_probability=probability, ngram_probability=probability)
        assert made.replace(MASK, "").strip()


def make_views(sentences: list[tuple[str, ...]], count: int, sets: int, *chances: float) -> list[tuple[str, ...]]:
    views = Views(sentences, count, 0, *chances)
    return [views.make(number) for number in range(sets * views.per_set)]


def test_a_view_is_not_its_sentence() -> None:
    views = make_views([(text,) for text in TEXTS], 3, 1, 0.1, 0.25)
    assert all(view != (TEXTS[i // 3],) for i, view in enumerate(views))


def test_both_texts_of_a_pair_are_altered() -> None:
    views = make_views([("one two three four", CHINESE)] * 20, 2, 1, 1.0, 0.0)
    assert len(views) == 40
    assert all(MASK in first and MASK in second and " " not in second for first, second in views)


def test_sets_are_numbered_one_after_the_other() -> None:
    views = make_views([(text,) for text in TEXTS], 2, 3, 0.1, 0.25)
    assert len(views) == 3 * 2 * len(TEXTS)
    for number, (one_set, index, view) in {0: (0, 0, 0), 1: (0, 0, 1), 602: (1, 1, 0), 1799: (2, 299, 1)}.items():
        assert views[number] == (make_view(TEXTS[index], index, 2 * one_set + view, 0),)
    assert views[:600] == make_views([(text,) for text in TEXTS], 2, 1, 0.1, 0.25)
    assert sum(one != other for one, other in zip(views[:600], views[600:1200], strict=True)) > 400
