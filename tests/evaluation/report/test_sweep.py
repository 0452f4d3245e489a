from __future__ import annotations

import itertools
import json
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from kd_lightning.cli.report import main
from kd_lightning.evaluation.report.files import load_report
from kd_lightning.evaluation.report.sweep import build_sweep, headline, read_points, report_sweep
from kd_lightning.evaluation.report.sweep.page import sentences
from kd_lightning.evaluation.report.sweep.pictures import figures
from kd_lightning.runtime.errors import KDError
from kd_lightning.runtime.seals import write_sealed
from tests.evaluation.report.sweeps import begin, fail, finish, grid, searched, students


def document(folder: Path) -> dict[str, Any]:
    return build_sweep(read_points(folder))


def drawn(folder: Path) -> dict[str, Any]:
    return {name: figure for name, _, figure in figures(document(folder))}


class Page(HTMLParser):
    """The rows of the table, the text of everything, and whatever an element would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.cell: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.cell = ""

    def handle_data(self, data: str) -> None:
        if self.cell is not None:
            self.cell += data

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self.cell is not None:
            self.rows[-1].append(self.cell)
            self.cell = None


def test_points_that_differ_in_their_seed_are_one_configuration(tmp_path: Path) -> None:
    found = document(grid(tmp_path))
    assert [parameter["name"] for parameter in found["parameters"]] == ["temperature", "alpha"]
    means = {tuple(entry["values"].values()): entry["validation"] for entry in found["configurations"]}
    assert means[1, 0.9]["mean"] == pytest.approx(0.805)
    assert means[1, 0.9]["std"] == pytest.approx(statistics.stdev([0.80, 0.81]))
    assert means[4, 0.1] == {"mean": 0.74, "std": None, "values": [0.74]}
    assert list(means) == [(4, 0.9), (1, 0.9), (1, 0.1), (4, 0.1)], "the best mean first"
    assert found["noise"] == pytest.approx(statistics.stdev([0.80, 0.81]))
    assert found["teacher"]["validation"] == pytest.approx(0.86)
    assert found["configurations"][0]["baseline"]["mean"] == pytest.approx(0.75)


def test_one_that_lacks_seeds_is_not_chosen(tmp_path: Path) -> None:
    chosen = document(grid(tmp_path))["chosen"]
    assert chosen["values"] == {"temperature": 1, "alpha": 0.9}
    assert chosen["rank"] == 1
    assert chosen["test"]["values"] == pytest.approx([0.80 - 0.1234, 0.81 - 0.1234])


def test_what_failed_and_what_is_not_finished(tmp_path: Path) -> None:
    found = document(grid(tmp_path))
    (failed,) = found["failed"]
    assert failed["values"] == {"temperature": 4, "alpha": 0.9, "seed": 1}
    assert failed["error"] == "the loss is nan & <b>bold</b>"
    assert failed["command"] == "kd-train data=reviews temperature=4 alpha=0.9 seed=1"
    (unfinished,) = found["unfinished"]
    assert unfinished["values"] == {"temperature": 4, "alpha": 0.1, "seed": 1}
    assert sum(len(entry["points"]) for entry in found["configurations"]) == 6


def test_how_far_a_parameter_moves_the_score(tmp_path: Path) -> None:
    temperature, alpha = document(grid(tmp_path))["parameters"]
    low, high = [0.76, 0.77, 0.74], [0.80, 0.81, 0.82]
    assert [entry["value"] for entry in alpha["values"]] == [0.1, 0.9]
    assert [entry["mean"] for entry in alpha["values"]] == pytest.approx([np.mean(low), np.mean(high)])
    assert [entry["std"] for entry in alpha["values"]] == pytest.approx([np.std(low, ddof=1), np.std(high, ddof=1)])
    assert alpha["moves"] == pytest.approx(np.mean(high) - np.mean(low))
    assert temperature["numeric"]
    assert not temperature["searched"]


def test_a_point_with_several_seeds_counts_each(tmp_path: Path) -> None:
    found = document(students(tmp_path))
    assert found["configurations"][0]["values"] == {"model@student": "bilstm", "distillation": "dkd"}
    assert found["configurations"][0]["validation"]["values"] == pytest.approx([0.79, 0.80, 0.81])
    assert found["chosen"]["test"]["mean"] == pytest.approx(0.80 - 0.1234)
    assert [entry["parameters"] for entry in found["configurations"]] == [4_000_000] * 2 + [400_000] * 2


def test_numbers_written_in_two_ways_are_one_value(tmp_path: Path) -> None:
    for seed, text in enumerate(("1", "1.0", "1e0")):
        finish(begin(tmp_path, temperature=text, seed=seed), 0.8)
    assert document(tmp_path)["parameters"] == []
    assert len(document(tmp_path)["configurations"][0]["validation"]["values"]) == 3


def test_a_parameter_that_only_some_points_set_is_read_from_the_configuration_of_the_others(tmp_path: Path) -> None:
    finish(begin(tmp_path, alpha=0.5), 0.8)
    finish(begin(tmp_path, temperature=8), 0.7)
    first, second = document(tmp_path)["configurations"]
    assert first["values"] == {"alpha": 0.5, "temperature": 2}
    assert second["values"] == {"alpha": 0.9, "temperature": 8}


def test_the_page_shows_the_test_score_of_the_chosen_one_only(tmp_path: Path) -> None:
    report_sweep(grid(tmp_path))
    text = (tmp_path / "report.html").read_text()
    heading, *rows = Page(text).rows
    assert heading == [
        "",
        "temperature",
        "alpha",
        "validation accuracy",
        "seeds",
        "gain over the student from labels",
        "test accuracy",
    ]
    assert rows == [
        ["1", "4", "0.9", "0.820", "1", "+0.070", ""],
        ["2", "1", "0.9", "0.805 ± 0.007", "2", "+0.055", "0.682 ± 0.007"],
        ["3", "1", "0.1", "0.765 ± 0.007", "2", "+0.015", ""],
        ["4", "4", "0.1", "0.740", "1", "-0.010", ""],
    ]
    for hidden in (0.82, 0.76, 0.77, 0.74):
        assert f"{hidden - 0.1234:.3f}" not in text
        assert f"{hidden - 0.1234:.3f}" not in (tmp_path / "sweep.json").read_text()
    assert json.loads((tmp_path / "sweep.json").read_text()) == document(tmp_path)


def test_the_page_needs_nothing_else_and_believes_nothing(tmp_path: Path) -> None:
    report_sweep(students(tmp_path))
    folder = begin(tmp_path, **{"model@student": "bilstm", "distillation": "x</pre><script>alert(1)</script>"})
    fail(folder, "<img src=http://example.org/x.png> & more")
    report_sweep(tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.loads
    assert all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert not {"script", "link", "iframe", "i"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert "&lt;i&gt;tiny&lt;/i&gt;" in text
    assert '<meta name="viewport"' in text


def test_the_page_has_every_command_and_every_reason(tmp_path: Path) -> None:
    report_sweep(grid(tmp_path))
    text = (tmp_path / "report.html").read_text()
    for point in read_points(tmp_path):
        assert f"<pre>{point.command}</pre>" in text
    assert "ConfigError: the loss is nan &amp; &lt;b&gt;bold&lt;/b&gt;" in text
    assert "6 points finished, 1 failed, 1 unfinished." in text


def test_the_pictures_are_files_and_show_something(tmp_path: Path) -> None:
    from matplotlib.image import imread

    report_sweep(grid(tmp_path))
    files = sorted(tmp_path.glob("*.png"))
    names = ["heatmap", "latency", "parameter_alpha", "parameter_temperature", "size"]
    assert [file.stem for file in files] == names
    text = (tmp_path / "report.html").read_text()
    assert len(re.findall("<img ", text)) == len(names)
    for file in files:
        pixels = imread(file)[..., :3]
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 0.05, "not blank"


def test_pictures_of_an_earlier_report_go(tmp_path: Path) -> None:
    for temperature, alpha in ((1.5, 0.2), (3.5, 0.4), (5.5, 0.6)):
        finish(begin(tmp_path, temperature=temperature, alpha=alpha), 0.7)
    (tmp_path / "own.png").write_bytes(b"")
    report_sweep(tmp_path)
    assert (tmp_path / "scatter.png").is_file()
    for temperature, alpha in ((1.5, 0.4), (1.5, 0.6), (3.5, 0.2), (3.5, 0.6)):
        finish(begin(tmp_path, temperature=temperature, alpha=alpha), 0.7)
    report_sweep(tmp_path)
    names = {file.name for file in tmp_path.glob("*.png")}
    assert names == {
        "heatmap.png", "parameter_alpha.png", "parameter_temperature.png", "size.png", "latency.png", "own.png",
    }  # fmt: skip


def test_the_heat_map(tmp_path: Path) -> None:
    axes, bar = drawn(grid(tmp_path))["heatmap"].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("alpha", "temperature")
    image = axes.images[0]
    np.testing.assert_allclose(np.asarray(image.get_array()), [[0.015, 0.055], [-0.01, 0.07]])
    assert image.cmap(image.norm(0.0))[:3] == pytest.approx((1, 1, 1), abs=0.01), "the student from labels is white"
    red, _, blue, _ = image.cmap(image.norm(0.015))
    assert blue > red, "what is better than that is blue"
    written = {text.get_text() for text in axes.texts}
    assert {"+0.055", "±0.007, n=2", "-0.010", "n=1"} <= written
    (frame,) = axes.patches
    assert frame.get_xy() == pytest.approx((0.52, -0.48)), "around alpha=0.9, temperature=1"
    assert bar.get_ylabel() == "validation accuracy: gain over the\nstudent from labels"


def test_the_gain_is_that_over_the_student_with_the_same_start_seed_by_seed(tmp_path: Path) -> None:
    for alpha, score in ((0.1, 0.78), (0.9, 0.81)):
        finish(begin(tmp_path, temperature=1, alpha=alpha), score, baseline=0.70, same_start=0.79, seeds=3)
        finish(begin(tmp_path, temperature=4, alpha=alpha), score, baseline=0.70, same_start=0.79, seeds=3)
    found = document(tmp_path)
    assert found["against"] == "baseline_initialised"
    assert found["configurations"][0]["gain"]["values"] == pytest.approx([0.02 + 0.01 * i for i in (-1, 0, 1)])
    assert found["configurations"][-1]["baseline"]["mean"] == pytest.approx(0.79)
    assert "the same student from labels with the same start has 0.790" in " ".join(sentences(found))
    axes, bar = drawn(tmp_path)["heatmap"].axes
    assert {"+0.020", "-0.010"} <= {text.get_text() for text in axes.texts}
    assert bar.get_ylabel() == "validation accuracy: gain over the\nstudent from labels, same start"
    finish(begin(tmp_path, temperature=8, alpha=0.9), 0.8, baseline=0.70)
    assert document(tmp_path)["against"] == "baseline", "not all have one with the same start"


def test_a_heat_map_without_a_student_from_labels_and_with_a_hole(tmp_path: Path) -> None:
    for temperature, alpha in ((1, 0.1), (1, 0.9), (4, 0.1)):
        finish(begin(tmp_path, temperature=temperature, alpha=alpha), 0.7 + alpha / 10, baseline=None)
    image = drawn(tmp_path)["heatmap"].axes[0].images[0]
    assert np.ma.getmaskarray(np.ma.masked_invalid(image.get_array())).tolist() == [[False, False], [False, True]]
    report_sweep(tmp_path)
    assert "gain over the student" not in (tmp_path / "report.html").read_text()


def test_where_nothing_is_distilled_there_is_no_gain(tmp_path: Path) -> None:
    for temperature, alpha in ((1, 0.1), (1, 0.9), (4, 0.1), (4, 0.9)):
        finish(begin(tmp_path, temperature=temperature, alpha=alpha), 0.7 + alpha / 10, stages=["teacher", "baseline"])
    found = document(tmp_path)
    assert found["against"] is None
    assert found["configurations"][0]["gain"]["mean"] is None
    assert drawn(tmp_path)["heatmap"].axes[1].get_ylabel() == "validation accuracy"


def test_of_a_score_that_is_better_when_lower_the_gain_is_positive_too(tmp_path: Path) -> None:
    for alpha in (0.1, 0.9):
        finish(begin(tmp_path, alpha=alpha), 0.5 + alpha / 10, baseline=0.55)
        path = next(folder for folder in tmp_path.iterdir() if str(alpha) in folder.name) / "report.json"
        report = json.loads(path.read_text())
        report["scores"]["accuracy"]["mode"] = "min"
        write_sealed(path, {key: value for key, value in report.items() if key != "checksum"})
    gains = {entry["values"]["alpha"]: entry["gain"]["mean"] for entry in document(tmp_path)["configurations"]}
    assert gains[0.1] > 0 > gains[0.9]


def test_a_heat_map_for_each_strategy(tmp_path: Path) -> None:
    for strategy in ("soft_target", "dkd"):
        for temperature, alpha in ((1, 0.1), (1, 0.9), (4, 0.1), (4, 0.9)):
            finish(begin(tmp_path, distillation=strategy, temperature=temperature, alpha=alpha), 0.7 + alpha / 10)
    maps = drawn(tmp_path)
    titles = {maps[f"heatmap_{number}"].axes[0].get_title() for number in (1, 2)}
    assert titles == {"distillation=dkd", "distillation=soft_target"}


def test_a_shade_is_the_same_step_in_every_heat_map(tmp_path: Path) -> None:
    """Each is white at its own student from labels."""
    for student, base, step in (("bilstm", 0.70, 0.05), ("transformer", 0.80, 0.01)):
        for temperature, alpha in ((1, 0.1), (1, 0.9), (4, 0.1), (4, 0.9)):
            folder = begin(tmp_path, **{"model@student": student}, temperature=temperature, alpha=alpha)
            finish(folder, base + (step if alpha > 0.5 else -step), baseline=base)
    images = [drawn(tmp_path)[f"heatmap_{number}"].axes[0].images[0] for number in (1, 2)]
    assert [np.asarray(image.get_array())[0].tolist() for image in images] == [
        pytest.approx([-0.01, 0.01]), pytest.approx([-0.05, 0.05]),
    ]  # fmt: skip
    assert [image.norm.vmin + image.norm.vmax for image in images] == [0, 0], "the student from labels is white"
    assert [image.norm.vmax - image.norm.vmin for image in images] == pytest.approx([0.1, 0.1])


def test_of_many_heat_maps_those_with_the_best_are_drawn(tmp_path: Path) -> None:
    for number, (temperature, alpha) in itertools.product(range(8), ((1, 0.1), (1, 0.9), (4, 0.1), (4, 0.9))):
        finish(begin(tmp_path, distillation=f"s{number}", temperature=temperature, alpha=alpha), 0.7 + number / 100)
    found = {name: (caption, figure) for name, caption, figure in figures(document(tmp_path)) if "heat" in name}
    titles = [figure.axes[0].get_title() for _, figure in found.values()]
    assert titles == [f"distillation=s{number}" for number in (7, 6, 5, 4, 3, 2)]
    assert "2 more; see the table" in found["heatmap_6"][0]


def test_values_with_which_every_point_failed_are_in_the_heat_map(tmp_path: Path) -> None:
    for temperature, alpha in itertools.product((1, 4, 64), (0.1, 0.9)):
        folder = begin(tmp_path, temperature=temperature, alpha=alpha)
        fail(folder, "diverged") if temperature == 64 else finish(folder, 0.8)
    axes = drawn(tmp_path)["heatmap"].axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["1", "4", "64"]
    shown = np.ma.getmaskarray(np.ma.masked_invalid(axes.images[0].get_array()))
    assert shown.tolist() == [[False, False], [False, False], [True, True]]


def test_schedules_are_values_too(tmp_path: Path) -> None:
    schedule = "{_target_: kd_lightning.schedules.Linear, start: 1.0, end: 0.5}"
    for temperature, alpha in itertools.product((1, 4), (0.9, schedule)):
        finish(begin(tmp_path, temperature=temperature, alpha=alpha), 0.8)
    axes = drawn(tmp_path)["heatmap"].axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.9", "Linear(start: 1.0,\nend: 0.5)"]
    report_sweep(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "Linear(start: 1.0, end: 0.5)</td>" in text
    assert "alpha={_target_: kd_lightning.schedules.Linear, start: 1.0, end: 0.5}" in text, "as the command has it"


def test_curves_of_one_parameter(tmp_path: Path) -> None:
    (axes,) = drawn(grid(tmp_path))["parameter_alpha"].axes
    line = next(line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_linestyle() == "-")
    assert list(line.get_ydata()) == pytest.approx([np.mean([0.76, 0.77, 0.74]), np.mean([0.80, 0.81, 0.82])])
    assert axes.get_xscale() == "linear"
    labels = {line.get_label(): line.get_ydata()[-1] for line in axes.lines if line.get_linestyle() == "--"}
    assert labels == {"student from labels": pytest.approx(0.75), "teacher": pytest.approx(0.86)}


def test_each_value_stands_beside_its_own_student_from_labels(tmp_path: Path) -> None:
    for student, base in (("bilstm", 0.70), ("transformer", 0.78)):
        for alpha in (0.1, 0.9):
            finish(begin(tmp_path, **{"model@student": student}, alpha=alpha), 0.8, baseline=base)
    maps = drawn(tmp_path)
    for name, levels in (("model@student", [0.70, 0.78]), ("alpha", [0.74, 0.74])):
        (axes,) = maps[f"parameter_{name}"].axes
        base = next(line for line in axes.lines if line.get_label() == "student from labels")
        assert list(base.get_ydata()) == pytest.approx(levels)


def test_a_search_is_drawn_as_points_and_parallel_lines(tmp_path: Path) -> None:
    maps = drawn(searched(tmp_path))
    parameters = {f"parameter_{name}" for name in ("temperature", "alpha", "optimizer.lr")}
    assert set(maps) == {"scatter", *parameters, "parallel", "size", "latency"}
    axes = maps["parallel"].axes[0]
    assert len([line for line in axes.lines if len(line.get_xdata()) == 4]) == 12
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert ticks == ["temperature", "alpha", "optimizer.lr", "validation\naccuracy"]
    best = next(line for line in axes.lines if line.get_linewidth() == 2.6)
    assert best.get_ydata()[-1] == 1.0, "the chosen one is highest on the score's scale"
    colours = {to_rgb(line.get_color()) for line in axes.lines if len(line.get_xdata()) == 4}
    assert max(min(colour) for colour in colours) < 0.85, "none is lost on white, the poor ones neither"
    assert maps["parameter_optimizer.lr"].axes[0].get_xscale() == "log"
    assert maps["parameter_alpha"].axes[0].get_xscale() == "linear"


def test_a_search_among_few_values_has_parallel_lines_too(tmp_path: Path) -> None:
    for strategy, temperature in (("dkd", 1), ("dkd", 4), ("soft_target", 1), ("soft_target", 4)):
        finish(begin(tmp_path / "tpe", "OptunaSweeper", distillation=strategy, temperature=temperature), 0.8)
        finish(begin(tmp_path / "grid", distillation=strategy, temperature=temperature), 0.8)
    assert "parallel" not in drawn(tmp_path / "grid")
    axes = drawn(tmp_path / "tpe")["parallel"].axes[0]
    assert {"dkd", "soft_target", "1", "4"} <= {text.get_text() for text in axes.texts}


def test_students_of_two_sizes_are_held_against_their_price(tmp_path: Path) -> None:
    maps = drawn(students(tmp_path))
    for name, prices in (("size", [4e5, 4e6]), ("latency", [0.1, 1.0])):
        (axes,) = maps[name].axes
        handles = {label for _, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        assert handles == {"bilstm", "<i>tiny</i>", "teacher", "student from labels"}
        assert [label.get_text() for label in axes.get_xticklabels()][-1] in ("22.7M", "12.3"), "the teacher's"
        drawn_at = {x for line in axes.lines if line.get_marker() == "o" for x in line.get_xdata()}
        assert sorted(drawn_at) == pytest.approx(prices)


def test_students_that_are_alike_are_alike_fast(tmp_path: Path) -> None:
    for alpha, latency in ((0.1, 1.0), (0.5, 9.0), (0.9, 1.2)):
        folder = begin(tmp_path, alpha=alpha)
        finish(folder, 0.8)
        report = load_report(folder)
        report["models"]["distilled"]["latency_ms"]["p50"] = latency
        write_sealed(folder / "report.json", report)
    (axes,) = drawn(tmp_path)["latency"].axes
    assert {x for line in axes.lines if line.get_marker() == "o" for x in line.get_xdata()} == {1.2}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1.20", "12.3"]


def test_the_last_lines(tmp_path: Path) -> None:
    lines = headline(report_sweep(grid(tmp_path)), tmp_path).splitlines()
    assert lines == [
        "Best on validation of 4 configurations: temperature=1 alpha=0.9, accuracy 0.805 ± 0.007 on validation "
        "(2 seeds) and 0.682 ± 0.007 on test.",
        "6 points finished, 1 failed, 1 unfinished.",
        "1 failed: the loss is nan & <b>bold</b>",
        f"report: {tmp_path / 'report.html'}",
    ]


def test_a_sweep_that_did_not_help_says_so(tmp_path: Path) -> None:
    finish(begin(tmp_path, alpha=0.1), 0.76)
    finish(begin(tmp_path, alpha=0.9), 0.77, baseline=0.76)
    said = "distillation did not help here"
    assert said not in " ".join(sentences(document(tmp_path)))
    finish(begin(tmp_path, alpha=0.5), 0.78, baseline=0.78)
    assert said in " ".join(sentences(document(tmp_path)))


def test_a_sweep_of_which_nothing_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fail(begin(tmp_path, alpha=2), "alpha=2 must be between 0 and 1")
    begin(tmp_path, alpha=0.5)
    main([str(tmp_path)])
    assert "0 points finished, 1 failed, 1 unfinished." in capsys.readouterr().out
    assert not list(tmp_path.glob("*.png"))
    assert "alpha=2 must be between" in (tmp_path / "report.html").read_text()


def test_folders_that_are_no_sweep(tmp_path: Path) -> None:
    with pytest.raises(KDError, match="no such folder"):
        report_sweep(tmp_path / "nowhere")
    with pytest.raises(KDError, match="holds no points of a sweep"):
        report_sweep(tmp_path)
    (tmp_path / "seed_0").mkdir()
    with pytest.raises(KDError, match="holds a single run, not a sweep: it is not finished"):
        report_sweep(tmp_path)
    (tmp_path / "report.html").write_text("")
    with pytest.raises(KDError, match=r"holds a single run, not a sweep: its report is .*report\.html"):
        report_sweep(tmp_path)
    with pytest.raises(KDError, match=r"report\.html: a file; expected the folder of a sweep"):
        report_sweep(tmp_path / "report.html")
    begin(tmp_path / "runs" / "mine", alpha=1)
    with pytest.raises(KDError, match=r"but folders of some: kd-report .*runs/mine"):
        report_sweep(tmp_path / "runs")


@pytest.mark.parametrize("name", ["overrides.json", "score.json", "report.json", "config.yaml"])
def test_a_flipped_digit_in_any_file_of_a_point_is_no_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = grid(tmp_path) / "temperature=1,alpha=0.1,seed=0" / name
    whole = path.read_text(encoding="utf-8")
    first = whole.index("\n") if name == "config.yaml" else 0
    places = [match.start() for match in re.finditer(r"\d", whole[first:])][:20]
    for place in places:
        changed = "5" if whole[first + place] == "4" else "4"
        path.write_text(whole[: first + place] + changed + whole[first + place + 1 :], encoding="utf-8")
        with pytest.raises(SystemExit, match=rf"^kd-report: [^\n]*{name} [^\n]*damaged[^\n]*$"):
            main([str(tmp_path)])


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"kd-report: .*nowhere: no such folder"):
        main([str(tmp_path / "nowhere")])
    (grid(tmp_path) / "temperature=1,alpha=0.1,seed=0" / "score.json").write_text('{"score": 0.')
    with pytest.raises(SystemExit, match=r"kd-report: .*score\.json cannot be read"):
        main([str(tmp_path)])
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "kd-report runs/sweep" in capsys.readouterr().out
