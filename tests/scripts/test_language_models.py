"""What scripts/language_models.py and scripts/defaults.py measure is recorded, and drawn, whatever there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

import defaults
import language_models
import trainings


def test_of(**means: float | None) -> dict[str, Any]:
    return {"test": {name: mean and {"mean": mean, "std": mean / 10} for name, mean in means.items()}}


DOCUMENT = {
    "one": {"models": {
        "baseline": test_of(perplexity=900.0, kl_to_teacher=3.0, agreement=0.1),
        "baseline_initialised": test_of(perplexity=458.0, kl_to_teacher=2.5, agreement=0.26),
        "distilled": test_of(perplexity=364.0, kl_to_teacher=2.0, agreement=0.31),
    }},
    "of other tokens": {"models": {
        "baseline": test_of(perplexity=51.5, kl_to_teacher=None), "distilled": test_of(perplexity=42.5)
    }},
    "not distilled": {"models": {"baseline": test_of(perplexity=77.0)}},
}  # fmt: skip


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **b: figures.append(self) or save(self, *a, **b))
    return figures


@pytest.mark.parametrize("names", [["one"], list(DOCUMENT)])
def test_the_picture_has_what_is_there_and_no_more(drawn: list[Figure], tmp_path: Path, names: list[str]) -> None:
    language_models.picture({name: DOCUMENT[name] for name in names}, tmp_path / "lm.png")
    assert (tmp_path / "lm.png").stat().st_size > 1000
    texts = [{text.get_text() for text in axes.texts} for axes in drawn[0].axes]
    assert [label.get_text() for label in drawn[0].axes[0].get_yticklabels()] == names
    more = {"42.5", "51.5", "77.0", "text alone"} if len(names) > 1 else set()
    assert texts[0] == {"364", "458", "distilled", "text alone, same start"} | more
    assert texts[1:] == [{"2.00", "2.50"}, {"0.310", "0.260"}], "names stand once"


def test_a_row_is_put_beside_those_that_are_there(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    assert trainings.read_result(file) == {}
    trainings.write_result(file, {"x": 1}, "quick", "a")
    trainings.write_result(file, {"x": 2}, "quick", "b")
    trainings.write_result(file, {"x": 3}, "quick", "a")
    assert json.loads(file.read_text()) == {"quick": {"a": {"x": 3}, "b": {"x": 2}}}


@pytest.mark.parametrize(
    ("script", "names"), [(defaults, defaults.names()), (language_models, [*language_models.STUDENTS])]
)
def test_all_is_measured_or_what_is_named(
    script: Any, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = {"command": "kd-train", "environment": {}}
    measured: list[str] = []
    monkeypatch.setattr(script, "RESULT", tmp_path / "results.json")
    monkeypatch.setattr(script, "train", lambda name, *_: measured.append(name) or report)
    monkeypatch.setattr(script, "row", lambda _: {"models": {}})
    monkeypatch.setattr(script, "picture", lambda *_: None, raising=False)
    for given in ([], [names[1]]):
        measured.clear()
        monkeypatch.setattr("sys.argv", ["script.py", *given])
        script.main()
        assert measured == (given or names)
    monkeypatch.setattr("sys.argv", ["script.py", "nothing"])
    with pytest.raises(SystemExit, match="script: there is no 'nothing'; there are "):
        script.main()
