"""`kd-slurm` without a SLURM: what it would submit, what it says of a sweep's folder, and its one-line refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from kd_lightning.cli.slurm.command import main
from kd_lightning.cli.slurm.status import JOBS, remember, status
from kd_lightning.cli.slurm.sweep import expand, recorded
from kd_lightning.config.instantiate import conf_dir
from kd_lightning.pipeline.resolvers import register_resolvers
from kd_lightning.runtime.borders import visible
from kd_lightning.runtime.errors import KDError
from kd_lightning.runtime.slurm_logs import link_logs
from kd_lightning.runtime.slurm_queue import submit
from tests.names import HOSTILE

pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="the extra slurm is not installed")

GRID, PAIR = "temperature=1,4 alpha=0.5,0.9", "alpha=0.5,0.9"
Program = Callable[[str, str], Path]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Write a stand-in for one of SLURM's commands, which also keeps its arguments in a file; others there are not."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def write(name: str, body: str) -> Path:
        log = folder / f"{name}.log"
        (folder / name).write_text(f'#!/bin/bash\necho "$@" >>{log}\n{body}\n')
        (folder / name).chmod(0o755)
        return log

    return write


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, tuple[str, str]]:
    """Return (sbatch's command, script) of each job that would be submitted."""
    main(["pipeline", *arguments, "--dry-run"])
    printed = capsys.readouterr().out.split("\n\n# ")[1:]
    jobs = {}
    for part in printed:
        head, _, script = part.partition("\n")
        name, _, command = head.partition(": ")
        jobs[name.lower()] = (command, script)
    return jobs


def options(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return {line.partition("=")[0]: line.partition("=")[2] for line in lines}


def test_points_are_those_of_a_multirun() -> None:
    sweep = expand(["name=a", "temperature=1,4", "data.views=choice(1,2)", "hydra.sweep.dir=x"], "hydra/launcher=slurm")
    assert [point[1:] for point in sweep.points] == [
        [f"temperature={t}", f"data.views={v}"] for t in (1, 4) for v in (1, 2)
    ]
    assert sweep.hydra == ["hydra.sweep.dir=x"]
    assert sweep.folder == Path.cwd() / "x"
    preset = expand(["sweep=temperature_alpha", "temperature=3"], "hydra/launcher=slurm").points
    assert [sorted(point) for point in preset] == [
        [f"alpha={alpha}", "sweep=temperature_alpha", "temperature=3"] for alpha in (0.1, 0.5, 0.9)
    ]


def test_the_dry_run_shows_four_chained_jobs_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], program: Program
) -> None:
    folder = tmp_path / "sweep"
    jobs = dry_run(capsys, "name=grid", f"hydra.sweep.dir={folder}", "--sweep", GRID, "hydra.launcher.partition=small")
    assert [(name, command.split()[1:-1]) for name, (command, _) in jobs.items()] == [
        ("teacher", []),
        ("cache", ["--dependency=afterok:TEACHER", "--kill-on-invalid-dep=yes"]),
        ("sweep", ["--dependency=afterok:CACHE", "--kill-on-invalid-dep=yes"]),
        ("report", ["--dependency=afterany:SWEEP"]),
    ]
    for name, (_, script) in jobs.items():
        asked = options(script)
        assert asked["job-name"] == f"kd-grid-{name}"
        assert asked["partition"] == "small"
        assert asked["ntasks-per-node"] == asked["nodes"] == "1"
        assert "ntasks" not in asked, "a bare --ntasks makes Lightning refuse"
        assert asked["output"] == f"{folder}/slurm/{'%A_%a' if name == 'sweep' else '%j'}.out"
        assert asked["open-mode"] == "append"
        assert ("signal" in asked) == (name in ("teacher", "sweep")), (
            "others have no handler, and would be killed by it"
        )
    assert options(jobs["sweep"][1])["array"] == "0,1,2,3%32"
    assert not folder.exists()


def test_a_task_of_the_array_runs_its_point(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], program: Program
) -> None:
    ran = program("srun", "")
    overrides = ["data=text_files", "data.train_file='my data.csv'", "sweep=temperature_alpha", "temperature=1,4"]
    setup = "hydra.launcher.setup=['export FROM_SETUP=1']"
    script = dry_run(capsys, *overrides, setup, f"hydra.sweep.dir={tmp_path}/sweep")["sweep"][1]
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "4"}
    command = ["/bin/bash", "-eu", "-c", f"{script}\necho $FROM_SETUP"]
    assert subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120).stdout == b"1\n"
    words = ran.read_text().split(" -m kd_lightning.cli.train ")[1].strip()
    assert words == (
        f"-m hydra.sweep.dir={tmp_path}/sweep data=text_files data.train_file='my data.csv' sweep=temperature_alpha "
        "temperature=4 alpha=0.5"
    )


def test_tasks_nodes_and_gpus_are_the_trainers(capsys: pytest.CaptureFixture[str], program: Program) -> None:
    more = ["trainer=ddp", "trainer.devices=4", "trainer.num_nodes=2", "trainer.accelerator=gpu"]
    jobs = {name: options(script) for name, (_, script) in dry_run(capsys, *more, "--sweep", PAIR).items()}
    for name in ("teacher", "sweep"):
        assert [jobs[name][key] for key in ("nodes", "ntasks-per-node", "gpus-per-node")] == ["2", "4", "4"]
    assert [jobs["cache"][key] for key in ("nodes", "ntasks-per-node", "gpus-per-node")] == ["1", "1", "1"]
    assert "gpus-per-node" not in jobs["report"]


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["teacher.checkpoint=runs/a"], ["cache", "sweep", "report"]),
        (["teacher.cache=off"], ["teacher", "sweep", "report"]),
        (["stages=[baseline]"], ["sweep", "report"]),
        (["experiment=mean_teacher"], ["sweep", "report"]),
    ],
)
def test_a_job_that_has_nothing_to_do_is_left_out(
    overrides: list[str], names: list[str], capsys: pytest.CaptureFixture[str], program: Program
) -> None:
    assert list(dry_run(capsys, *overrides, "--sweep", PAIR)) == names


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["temprature=1,2", "--dry-run"], "temprature: there is no such key; did you mean 'temperature'"),
        (["--sweep", "temperature=[1,2", "--dry-run"], "[1,2"),
        (["--sweep", "distillation=soft_target,dkdd", "--dry-run"], "dkdd"),
        (["hydra.launcher.partitoin=a", "--dry-run"], "partitoin"),
        (["sweep=optuna", "--dry-run"], "run kd-train -m hydra/launcher=slurm instead"),
        (["temperature=1,2"], "there is no sbatch on PATH: run this on a submit host, or add --dry-run"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], says: str, program: Program) -> None:
    if "sweep=optuna" in arguments:
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="the extra sweep is not installed")
    with pytest.raises(SystemExit) as ended:
        main(["pipeline", *arguments])
    assert ended.value.code == 2
    assert says in str(ended.value)
    assert str(ended.value).startswith("kd-slurm: ")
    assert "\n" not in str(ended.value)


def test_without_the_extra_one_line_names_it(tmp_path: Path) -> None:
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins" / "__init__.py").touch()  # stands before the real ones
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-m", "kd_lightning.cli.train", "-m", "hydra/launcher=slurm", "temperature=1,2"],
        capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr == (
        "kd-train: hydra/launcher/submitit_slurm needs a package that is not installed: "
        "pip install 'kd-lightning[slurm]'\n"
    )


def test_submission_chains_the_ids_and_a_second_one_is_refused(tmp_path: Path, program: Program) -> None:
    asked = program("sbatch", f"echo $((40 + $(wc -l <{tmp_path}/bin/sbatch.log)))")
    program("wc", 'exec /usr/bin/wc "$@"')
    folder = tmp_path / "sweep"
    main(["pipeline", f"hydra.sweep.dir={folder}", "--sweep", GRID])
    assert asked.read_text().splitlines() == [
        f"--parsable {folder}/slurm/teacher.sbatch",
        f"--parsable --dependency=afterok:41 --kill-on-invalid-dep=yes {folder}/slurm/cache.sbatch",
        f"--parsable --dependency=afterok:42 --kill-on-invalid-dep=yes {folder}/slurm/sweep.sbatch",
        f"--parsable --dependency=afterany:43 {folder}/slurm/report.sbatch",
    ]
    record = json.loads((folder / "slurm/jobs.json").read_text())
    assert record["jobs"] == {"teacher": "41", "cache": "42", "sweep": "43", "report": "44"}
    assert len(record["points"]) == 4

    program("squeue", 'echo "43_2|PENDING|Resources"')
    with pytest.raises(SystemExit, match="its jobs are still in the queue; to start again, scancel 43_2"):
        main(["pipeline", f"hydra.sweep.dir={folder}", "--sweep", GRID])


def test_what_cannot_be_written_is_not_submitted_and_what_cannot_be_noted_does_not_stay(
    tmp_path: Path, program: Program
) -> None:
    asked, cancelled = program("sbatch", "echo 7"), program("scancel", "")
    for name in ("file", "noted"):
        (tmp_path / name).mkdir()
    (tmp_path / "file" / "slurm").touch()
    with pytest.raises(SystemExit, match=r"^kd-slurm: [^\n]*file/slurm[^\n]*something of that name exists[^\n]*$"):
        main(["pipeline", "name=grid", f"hydra.sweep.dir={tmp_path / 'file'}", "--sweep", PAIR])
    assert not asked.exists()
    (tmp_path / "noted" / JOBS).mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"^kd-slurm: [^\n]*that is a folder, not a file[^\n]*$"):
        main(["pipeline", "name=grid", f"hydra.sweep.dir={tmp_path / 'noted'}", "--sweep", PAIR])
    assert asked.read_text().count("\n") == 4
    assert cancelled.read_text().split() == ["7"] * 4


def test_where_sbatch_refuses_a_job_none_stays(tmp_path: Path, program: Program) -> None:
    program("sbatch", 'case "$*" in *cache*) echo "sbatch: error: no such partition" >&2; exit 1;; esac; echo 7')
    cancelled = program("scancel", "")
    with pytest.raises(SystemExit, match="kd-slurm: sbatch refuses the job: sbatch: error: no such partition"):
        main(["pipeline", f"hydra.sweep.dir={tmp_path}/sweep", "--sweep", PAIR])
    assert cancelled.read_text() == "7\n"
    assert not (tmp_path / "sweep/slurm/jobs.json").exists()


def write_point(folder: Path, name: str, overrides: list[str], job: str | None = None, **files: object) -> Path:
    """Write a point's folder as kd-train leaves it, with a log of the job."""
    point = folder / name
    point.mkdir(parents=True)
    (point / "overrides.json").write_text(json.dumps({"overrides": overrides, "command": "kd-train"}))
    for file, content in files.items():
        (point / f"{file}.json").write_text(json.dumps(content))
    if job is not None:
        (folder / "slurm").mkdir(exist_ok=True)
        (folder / "slurm" / f"{job}.out").touch()
        (point / "slurm").mkdir()
        (point / "slurm" / f"{job}.out").symlink_to(f"../../slurm/{job}.out")
    return point


def test_status_tells_every_state(tmp_path: Path, program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    points = [["name=a", f"temperature={number}"] for number in range(9)]
    remember(tmp_path, {"teacher": "11", "sweep": "12", "report": "13"}, points)
    write_point(tmp_path, "p0", points[0][::-1], "12_0", score={"score": 0.875, "metric": "accuracy"})
    failure = {"error": "data.train_file=x.csv: no such file", "type": "ConfigError"}
    write_point(tmp_path, "p1", points[1], "12_1", failure=failure)
    stage = write_point(tmp_path, "p2", points[2], "12_2") / "seed_0" / "distill"
    stage.mkdir(parents=True)
    (stage / "settings.json").touch()
    write_point(tmp_path, "p3", points[3], "12_3")
    write_point(tmp_path, "p4", points[4], "12_4")
    write_point(tmp_path, "p5", points[5])
    write_point(tmp_path, "p8", points[8], "9_8", failure=failure)  # of a chain before this one
    program("squeue", 'printf "%s\\n" "12_2|RUNNING|None" "12_3|PENDING|BeginTime" "12_6|PENDING|Resources" '
            '"12_8|PENDING|Priority" "13|PENDING|Dependency"')  # fmt: skip
    program("sacct", 'printf "%s\\n" "11|COMPLETED" "12_0|COMPLETED" "12_1|FAILED" "12_4|CANCELLED by 0"')
    links, rows = status(tmp_path)
    assert [(row.name, row.state, row.says, row.job) for row in rows] == [
        ("temperature=0", "finished", "accuracy 0.8750", "12_0"),
        ("temperature=1", "failed", "ConfigError: data.train_file=x.csv: no such file", "12_1"),
        ("temperature=2", "running", "seed_0/distill", "12_2"),
        ("temperature=3", "requeued", "BeginTime", "12_3"),
        ("temperature=4", "failed", "the job ended as CANCELLED", "12_4"),
        ("temperature=5", "unfinished", "", "12_5"),
        ("temperature=6", "pending", "Resources", "12_6"),
        ("temperature=7", "not started", "", "12_7"),
        ("temperature=8", "pending", "Priority", "12_8"),
    ]
    assert rows[2].log == tmp_path / "slurm" / "12_2.out"
    assert [(row.name, row.state, row.says) for row in links] == [
        ("teacher", "finished", ""), ("report", "pending", "Dependency"),
    ]  # fmt: skip
    main(["status", str(tmp_path)])
    printed = capsys.readouterr().out
    assert f"temperature=1  failed       ConfigError: data.train_file=x.csv: no such file  12_1  {tmp_path}" in printed
    assert "9 points: 1 finished, 2 failed, 1 running, 1 requeued, 1 unfinished, 2 pending, 1 not started" in printed


@pytest.mark.parametrize("name", HOSTILE)
def test_status_shows_names_as_they_are(
    name: str, tmp_path: Path, program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    points = [["name=a", f"data.text_column={name}"], ["name=a", "data.text_column=b"]]
    remember(tmp_path, {"sweep": "12"}, points)
    write_point(tmp_path, "p0", points[0], "12_0", failure={"error": name, "type": "ConfigError"})
    program("squeue", "true")
    program("sacct", "true")
    main(["status", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.replace("\n", "").isprintable()
    assert f"data.text_column={visible(name)}" in printed
    assert f"ConfigError: {visible(name)}" in printed
    assert len(printed.splitlines()) == 4


def test_status_without_slurm_knows_the_points_of_a_multirun(tmp_path: Path, program: Program) -> None:
    (tmp_path / "multirun.yaml").write_text(
        "hydra:\n  overrides: {task: ['name=a', 'temperature=1,2']}\n"
        "  sweeper: {_target_: hydra._internal.core_plugins.basic_sweeper.BasicSweeper, params: {alpha: '0.5,0.9'}}\n"
    )
    write_point(tmp_path, "p", ["alpha=0.9", "name=a", "temperature=1"], score={"score": 0.5, "metric": "accuracy"})
    _, rows = status(tmp_path)
    assert [(row.name, row.state) for row in rows] == [
        ("alpha=0.5 temperature=1", "not started"), ("alpha=0.5 temperature=2", "not started"),
        ("alpha=0.9 temperature=1", "finished"), ("alpha=0.9 temperature=2", "not started"),
    ]  # fmt: skip


def test_submitits_files_tell_the_job_of_a_point_that_waits(tmp_path: Path, program: Program) -> None:
    (tmp_path / "multirun.yaml").write_text(
        "hydra:\n  overrides: {task: ['temperature=1,2']}\n"
        "  sweeper: {_target_: hydra._internal.core_plugins.basic_sweeper.BasicSweeper, params: null}\n"
    )
    (tmp_path / "slurm").mkdir()
    for number in range(2):
        (tmp_path / "slurm" / f"5_{number}_submitted.pkl").touch()
    program("squeue", 'echo "5_1|PENDING|Resources"')
    assert [(row.state, row.job) for row in status(tmp_path)[1]] == [("not started", "5_0"), ("pending", "5_1")]


def test_finished_points_are_not_submitted_again(
    tmp_path: Path, program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    points = expand(["hydra.sweep.dir=x", *GRID.split()], "hydra/launcher=slurm").points
    for number in (0, 2, 3):
        scored = {} if number == 3 else {"score": {"score": 0.5, "metric": "accuracy"}}
        write_point(tmp_path, f"p{number}", points[number], **scored)
    given = [f"hydra.sweep.dir={tmp_path}", "--sweep", GRID]
    assert options(dry_run(capsys, *given)["sweep"][1])["array"] == "1,3%32"
    for number in (1, 3):
        (tmp_path / f"p{number}").mkdir(exist_ok=True)
        (tmp_path / f"p{number}" / "overrides.json").write_text(json.dumps({"overrides": points[number]}))
        (tmp_path / f"p{number}" / "score.json").write_text("{}")
    assert list(dry_run(capsys, *given)) == ["report"]


def test_a_folder_without_a_sweep_is_one_line(tmp_path: Path, program: Program) -> None:
    with pytest.raises(KDError, match="holds no sweep"):
        status(tmp_path)


def test_slurm_that_fails_is_one_line(tmp_path: Path, program: Program) -> None:
    remember(tmp_path, {"sweep": "12"}, [["temperature=1"]])
    program("squeue", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    assert status(tmp_path)[1][0].state == "not started", "of jobs that are long over squeue knows nothing"
    program("squeue", 'echo "error: Unable to contact slurm controller" >&2; exit 1')
    with pytest.raises(KDError, match="squeue fails: error: Unable to contact slurm controller"):
        status(tmp_path)


def test_run_and_log_name_each_other(
    tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").mkdir()
    described = (
        f"JobId=4 ArrayJobId=3\n   StdErr={tmp_path}/logs/a.err\n   StdIn=/dev/null\n   StdOut={tmp_path}/logs/a.out"
    )
    asked = program("scontrol", f"echo '{described}'")
    for name, value in {"JOB_ID": "4", "ARRAY_JOB_ID": "3", "ARRAY_TASK_ID": "1", "JOB_NODELIST": "n1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for _ in range(2):  # a requeued job comes again
        link_logs(tmp_path / "run")
    assert asked.read_text().splitlines() == ["show job 3_1"] * 2
    assert os.readlink(tmp_path / "run/slurm/3_1.out") == "../../logs/a.out"
    assert os.readlink(tmp_path / "run/slurm/3_1.err") == "../../logs/a.err"
    assert capsys.readouterr().out.startswith(f"SLURM job 3_1 on n1: writes to {tmp_path}/run\n")

    monkeypatch.setenv("SLURM_PROCID", "1")
    link_logs(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_launcher_takes_tasks_nodes_and_gpus_from_the_trainer() -> None:
    register_resolvers()
    given = ["hydra/launcher=slurm", "name=a", "trainer=ddp", "trainer.devices=3", "trainer.num_nodes=2"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        launcher = compose("config", given, return_hydra_config=True).hydra.launcher
        assert (launcher.tasks_per_node, launcher.nodes, launcher.gpus_per_node) == (3, 2, None)
        on_gpus = compose("config", [*given, "trainer.accelerator=gpu"], return_hydra_config=True).hydra.launcher
        assert on_gpus.gpus_per_node == 3
    assert launcher.timeout_min > 12, "submitit takes any signal for a time-out in shorter jobs"
    assert launcher.max_num_timeout > 0, "or nothing that ran out of time is put back in the queue"
    assert launcher.submitit_folder == "runs/a/slurm"


def test_an_optuna_sweep_is_known_by_its_folders_only(tmp_path: Path) -> None:
    file = tmp_path / "multirun.yaml"
    file.write_text(
        "hydra: {overrides: {task: []}, sweeper: {_target_: x.OptunaSweeper, params: {alpha: 'interval(0, 1)'}}}"
    )
    assert recorded(file) == []


def test_a_controller_that_does_not_react_is_said_in_one_line(
    tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    program("sbatch", "exec /bin/sleep 60")
    monkeypatch.setattr("kd_lightning.runtime.slurm_queue.PATIENCE", 0.2)
    with pytest.raises(KDError, match=r"^sbatch did not finish within 0\.2 s: is SLURM's controller up"):
        submit(tmp_path / "job.sh", [])
