"""The README is true: its tables are what results/ say, and its snippets run."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from tests import ROOT, forks
from tests.conftest import tiny_overrides, write_toy_csv

BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
QUICK = [
    "model@teacher.network=lstm_teacher", "teacher.network.hidden_size=16", "teacher.network.embedding_size=16",
    "data.tokenizer=wordpiece:400", "model@student=lstm_student",
]  # fmt: skip


def test_tables_are_what_the_results_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["update_readme.py", "--check"])
    importlib.import_module("update_readme").main()  # or it exits with what to run


def test_pages_that_files_describe_are_what_they_say() -> None:
    for name, text in importlib.import_module("make_docs").pages().items():
        written = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert written == text, f"docs/{name}: python scripts/make_docs.py"


def test_a_page_names_every_choice() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    shown = {path.parent.relative_to(ROOT / "conf").as_posix() for path in (ROOT / "conf").rglob("*/*.yaml")}
    assert shown - set(importlib.import_module("make_docs").GROUPS) == {"callbacks"}
    parts = dict(re.findall(r"^### `([\w/]+)`\n(.*?)(?=^##)", text, re.DOTALL | re.MULTILINE))
    for group in shown - {"callbacks"}:
        named = re.findall(r"^\| `(\w+)` \| [^|\s]", parts[group], re.MULTILINE)
        assert named == sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml")), group


def run(line: str, folder: Path) -> str:
    environment = {"KD_LIGHTNING_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    result = forks.command(*shlex.split(line), cwd=folder, environment=environment)
    assert result.returncode == 0, f"{line}\n{result.stderr}"
    return result.stdout


def python(file: str, folder: Path) -> str:
    environment = {**os.environ, "KD_LIGHTNING_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, file], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_bring_your_own_snippets_run_as_they_stand(tmp_path: Path) -> None:
    """Every command of the sections runs in one folder, in order, with settings appended only to make it small."""
    write_toy_csv(tmp_path / "my.csv")
    for language, text in BLOCKS:
        if found := re.match(r"# file: (\S+)\n", text):
            path = tmp_path / found[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert language in ("bash", "text", "python", "yaml")
    lines = [line for kind, text in BLOCKS if kind == "bash" for line in text.replace("\\\n", "").splitlines()]
    trained = [line for line in lines if line.startswith("kd-train")]
    assert len(trained) == 4
    small = tiny_overrides(tmp_path / "my.csv", tmp_path)
    budget = [o for o in small if o.startswith(("trainer", "teacher.trainer", "teacher.val", "valid", "teacher.opt"))]
    outputs = {}
    for line in lines:
        if line.startswith("make"):
            continue
        if line.startswith("kd-train"):
            name = re.search(r"name=(\w+)", line)[1]  # type: ignore[index]
            line += " " + " ".join(budget)
            if name == "mine":
                line += " " + " ".join(QUICK)
            if name == "taught":
                save_teacher(tmp_path / "my_teacher", tmp_path / "runs/mine/teacher/tokenizer")
            if name in ("taught", "huber"):
                line += " student.network.embedding_size=16"  # as wide as so small a teacher's
            outputs[name] = run(line, tmp_path)
        else:
            assert "p(science)" in run(line, tmp_path)
    assert set(outputs) == {"mine", "bag", "taught", "huber"}
    for name, output in outputs.items():
        assert "distilled" in output, name  # a narrow table breaks its heading
        assert (tmp_path / "runs" / name / "report.json").is_file()
    assert "finished before" not in outputs["bag"]
    reading = next(text for kind, text in BLOCKS if kind == "python" and "load_run" in text)
    (tmp_path / "reading.py").write_text(reading, encoding="utf-8")
    assert "['food', 'science', '运动'] tensor([[" in python("reading.py", tmp_path)


def save_teacher(folder: Path, tokenizer: Path) -> None:
    """A finished Hugging Face classifier for three classes, with its tokenizer, as save_pretrained leaves them."""
    loaded = AutoTokenizer.from_pretrained(str(tokenizer))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(loaded), num_labels=3, max_position_embeddings=64, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    loaded.save_pretrained(folder)


@pytest.mark.slow
def test_the_python_example_runs(tmp_path: Path) -> None:
    example = next(text for kind, text in BLOCKS if kind == "python" and not text.startswith("# file:"))
    (tmp_path / "example.py").write_text(example, encoding="utf-8")
    assert "tensor(" in python("example.py", tmp_path)
