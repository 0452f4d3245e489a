"""The parts of all pictures: dots with their numbers in rows, names at the ends of lines."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from kd_lightning.evaluation.report.style import Dot, End, dots, name_lines, new_figure


def test_dots_are_rows_from_the_top_with_their_numbers() -> None:
    axes = new_figure(6, 3).add_subplot()
    rows = [Dot("best", 3.25, (3.0, 3.5)), Dot("not measured", math.nan), Dot("worst", 1.0)]
    dots(axes, rows, "{:.2f}".format)
    assert [text.get_text() for text in axes.get_yticklabels()] == ["best", "not measured", "worst"]
    bottom, top = axes.get_ylim()
    assert bottom > top, "the first row is the highest"
    assert [(note.get_text(), note.get_position()[1]) for note in axes.texts] == [("3.25", 0), ("1.00", 2)]


@pytest.mark.parametrize("ends", [(0.5, 0.5, 0.5), (0.5, 0.51, 0.2), (0.0, 1.0, 0.4)])
def test_names_of_lines_keep_their_order_and_do_not_touch(ends: tuple[float, ...]) -> None:
    figure = new_figure(6, 4)
    axes = figure.add_subplot()
    axes.set_ylim(0, 1)
    name_lines(axes, [End(10.0, end, f"line {n}", "black") for n, end in enumerate(ends)])
    figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 for low, high in pairwise(boxes))
    heights = [text.get_position()[1] for text in axes.texts]
    assert sorted(range(3), key=lambda n: heights[n]) == sorted(range(3), key=lambda n: ends[n])
    frame = axes.get_window_extent()
    assert all(text.get_window_extent().x0 >= frame.x1 for text in axes.texts), "beside the lines, not over them"
    assert all(text.get_window_extent().x1 <= figure.bbox.x1 for text in axes.texts), "not cut off"


def test_a_line_that_ends_before_the_others_is_named_there() -> None:
    axes = new_figure(6, 4).add_subplot()
    axes.set_xlim(0, 10)
    name_lines(axes, [End(10, 0.5, "long", "black"), End(4, 0.2, "short", "black"), End(None, 0.9, "across", "black")])
    beside = {text.get_text(): text.get_position()[0] for text in axes.texts if text.get_text() != "short"}
    assert beside == {"long": 1.01, "across": 1.01}
    [short] = [text for text in axes.texts if text.get_text() == "short"]
    assert short.xy == (4, 0.2)  # type: ignore[attr-defined]
