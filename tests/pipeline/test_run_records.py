"""A run's folder from elsewhere: what `kd-status` reads of it is checked, and what it prints is one line each."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kd_lightning.cli.status import main
from kd_lightning.pipeline.run_records import PLAN, mark_reported, write_plan
from kd_lightning.pipeline.status import LOCK, run_status
from kd_lightning.runtime.errors import KDError
from kd_lightning.runtime.files import alone
from kd_lightning.runtime.seals import read_sealed, write_sealed
from tests.pipeline.planned_runs import STAGES, finish, planned, stop


def report_of(run: Path, trainings: str = "t") -> None:
    """Write a report and its page, as a command does at its end."""
    write_sealed(run / "report.json", {"settings": {"trainings": trainings}})
    (run / "report.html").touch()
    mark_reported(run, trainings)


def test_it_is_finished_once_its_report_is_of_its_stages(tmp_path: Path) -> None:
    run = planned(tmp_path / "run")
    for stage in STAGES:
        finish(run, stage)
    assert run_status(run).state == "stopped"
    report_of(run)
    assert run_status(run).state == "finished"
    finish(run, STAGES[1], files={"model.safetensors": "1"})  # trained again
    found = run_status(run)
    assert (found.state, "its report is not known" in found.note) == ("stopped", True)
    report_of(run, "u")
    assert run_status(run).state == "finished"
    write_sealed(run / "report.json", {"settings": {"trainings": "t"}})
    assert run_status(run).state == "stopped", "another run's report was put there"
    (run / "report.json").unlink()
    assert run_status(run).state == "stopped"


def test_the_plan_is_written_where_it_differs_or_is_unfinished(tmp_path: Path) -> None:
    run = planned(tmp_path / "run")
    stages: list[Any] = [SimpleNamespace(path=path, name=path, kind="baseline", steps=100) for path in STAGES]
    for stage in STAGES:
        finish(run, stage)
    write_plan(run, stages, None, "kd-train 1")
    assert run_status(run).command == "kd-train 1", "it had other names"
    report_of(run)
    write_plan(run, stages, None, "kd-train 2")
    assert (run_status(run).command, run_status(run).state) == ("kd-train 1", "finished")
    write_plan(run, [*stages, SimpleNamespace(path="seed_1/baseline", name="b", kind="baseline", steps=1)], None, "")
    assert run_status(run).state == "stopped", "the report is of fewer seeds"
    finish(run, "seed_1/baseline")
    assert run_status(run).state == "stopped"
    write_plan(run, stages, None, "kd-train 3")
    assert run_status(run).command == "kd-train 3", "fewer stages again"
    (run / PLAN).write_text("{")
    write_plan(run, stages, None, "kd-train 4")
    assert run_status(run).command == "kd-train 4", "what is damaged is written again"


ODD: list[tuple[str, Any]] = [
    ("stages", None), ("stages", ["x"]), ("stages", {}), ("stages", [{"path": "teacher"}]), ("command", 3),
    ("seconds", []), ("seconds", {"teacher": "a"}), ("seconds", {"teacher": 10**400}), ("reported", None),
    *(("stages", [{"path": "teacher", "name": "a", "kind": "", "steps": steps}]) for steps in ("a", True, -1, 10**30)),
    *(
        ("stages", [{"path": path, "name": "a", "kind": "", "steps": 1}])
        for path in (
            "/etc", "..", "../teacher", "seed_0/..", "tasks/../teacher", "seed_0", "seed_0/a/b", "teacher\x00",
            "seed_0/\x1b", "", "seed_x/a", "report", 3,
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), ODD)
def test_a_plan_of_another_shape_is_damaged(key: str, value: Any, tmp_path: Path) -> None:
    run = planned(tmp_path / "run")
    content = read_sealed(run / PLAN, "") | {key: value}
    write_sealed(run / PLAN, {name: entry for name, entry in content.items() if entry is not None})
    with pytest.raises(KDError, match=r"plan.json: .+ is .+, expected .+: remove it"):
        run_status(run)


@pytest.mark.parametrize(
    "other",
    [{"steps": "abc"}, {"seconds": "a"}, {"seconds": None}, {"validation": [1]}, {"validation": {}},
     {"validation": {"accuracy": "a"}}, {"monitor": None}, {"monitor": [1]}, {"files": {}}, {"fingerprint": 1}],
)  # fmt: skip
def test_a_record_of_another_shape_is_damaged(other: dict[str, Any], tmp_path: Path) -> None:
    run = planned(tmp_path / "run")
    finish(run, "teacher", **other)
    found = run_status(run).stages[0]
    assert found.state == "damaged"
    assert "expected" in found.note


def test_odd_logs_and_seals_are_passed_over(tmp_path: Path) -> None:
    run = planned(tmp_path / "run")
    stop(run, "teacher", 3)
    write_sealed(run / "teacher/checkpoints/seals.json", {"step": "3"})
    assert run_status(run).stages[0].step is None
    for number, text in enumerate(("step\n" + "9" * 5000 + "\n", "step\n" + "x" * 200_000 + "\n")):
        log = run / f"teacher/csv/version_{number}/metrics.csv"
        log.parent.mkdir(parents=True)
        log.write_text(text)
        with alone(run / "teacher" / LOCK, print):
            assert run_status(run).stages[0].step is None
    os.mkfifo(run / "teacher/csv/pipe")
    (run / "teacher/csv/version_9").mkdir()
    (run / "teacher/csv/pipe").rename(run / "teacher/csv/version_9/metrics.csv")
    with alone(run / "teacher" / LOCK, print):
        assert run_status(run).stages[0].state == "running"


def test_neither_pipes_nor_links_are_followed(tmp_path: Path) -> None:
    run = planned(tmp_path / "run")
    os.mkfifo(run / LOCK)
    (run / "slurm").mkdir()
    (run / "slurm/a.out").symlink_to("a.out")
    found = run_status(run)
    assert (found.log, found.by) == (run / "slurm/a.out", "unknown (.lock: not a plain file)")


@pytest.mark.parametrize(
    ("name", "content"),
    [("score.json", {}), ("score.json", {"score": "a", "metric": "b"}), ("failure.json", {"type": 1}),
     (PLAN, {"stages": 1}), ("score.json", "[" * 200_000), ("score.json", '{"score": NaN, "metric": "a"}')],
)  # fmt: skip
def test_a_damaged_point_hides_no_other(
    name: str, content: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for point in ("a=1", "a=2"):
        write_sealed(planned(tmp_path / point) / "overrides.json", {"overrides": [point]})
    if isinstance(content, str):
        (tmp_path / "a=1" / name).write_text(content)
    else:
        write_sealed(tmp_path / "a=1" / name, content)
    main([str(tmp_path)])
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split()[:2] == ["a=1", "damaged"]
    assert name in printed[1]
    assert printed[-1] == "2 points: 1 damaged, 1 waiting"


@pytest.mark.parametrize(
    "command",
    ["rm -rf ~", "kd-train; rm -rf ~", "kd-train a; rm -rf ~", "kd-train $(rm)", "kd-train 'a", "kd export",
     "kd-train a\nrm -rf ~", "kd train a | sh", "kd-train a > b", "", "kd-train #"],
)  # fmt: skip
def test_no_other_command_is_given_to_paste(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = planned(tmp_path / "run")
    write_sealed(run / PLAN, read_sealed(run / PLAN, "") | {"command": command})
    main([str(run)])
    assert capsys.readouterr().out.splitlines()[-1] == "to go on: run the same kd-train again"


def test_names_make_no_lines_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = planned(tmp_path / "r\nun")
    content = read_sealed(run / PLAN, "")
    content["stages"] = [entry | {"name": "a\nto go on: rm\x1b[2J"} for entry in content["stages"]]
    write_sealed(run / PLAN, content | {"command": "kd train 'name=a\nb'"})
    write_sealed(run / "failure.json", {"type": "a\nto go on: rm", "error": "b"})
    for lines in (5, 6):
        main([str(run)])
        printed = capsys.readouterr().out
        assert "\x1b" not in printed
        assert len(printed.splitlines()) == lines
        assert not [line for line in printed.splitlines() if line.startswith("to go on: rm")]
        (run / "failure.json").unlink(missing_ok=True)
