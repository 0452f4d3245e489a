"""Files that `kd-predict` and `kd-eval` are given: read as the run's own were, in line with what comes out."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from kd_lightning.cli import evaluate, predict
from kd_lightning.data import TextFiles
from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.training.run_folder import finish_stage, save_network

Run = Callable[..., Path]
Said = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def make_run(tmp_path: Path, toy_csv: Path, own_home: Path) -> Run:
    """Return a function that writes an untrained student as a finished run of such data."""

    def make(texts: int = 1, **data: Any) -> Path:
        read = TextFiles(str(toy_csv), tokenizer="wordpiece:300")
        torch.manual_seed(0)
        network = BiLSTM(**read.model_arguments("student"), embedding_size=4, hidden_size=4)
        stage = tmp_path / "run" / "seed_0" / "distill"
        task = {"class_names": read.class_names, "max_length": 16, "texts": texts, "role": "student"}
        save_network(stage, network, {}, task, read.student_tokenizer)
        finish_stage(
            stage,
            {"fingerprint": "f", "settings": {}, "validation": {"accuracy": 1.0}, "monitor": "accuracy", "mode": "max"},
        )
        OmegaConf.save(OmegaConf.create({"data": {"train_file": "train.csv", **data}}), tmp_path / "run/config.yaml")
        return tmp_path / "run"

    return make


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """Return a function that runs `kd-predict` and returns its rows."""

    def run(*arguments: object) -> list[dict[str, Any]]:
        predict.main([*map(str, arguments), "--json"])
        return [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]

    return run


def refused(tool: Any, *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        tool.main([*map(str, arguments)])
    assert "\n" not in str(ended.value)
    return str(ended.value)


def test_predict_reads_a_table_by_the_runs_columns(make_run: Run, said: Said, tmp_path: Path) -> None:
    run = make_run(text_column="review", label_column="stars", encoding="latin-1", quotes=False)
    file = tmp_path / "new.csv"
    file.write_bytes('id;review;x\n1;a "très good soup;2\n2; ;2\n3;an atom;2\n'.encode("latin-1"))
    rows = said(run, "--file", file)
    assert [row["text"] for row in rows] == ['a "très good soup', "", "an atom"]
    assert [row["label"] is None for row in rows] == [False, True, False]
    assert rows[1] == {"text": "", "label": None, "probabilities": None}
    assert rows == said(run / "seed_0" / "distill", "--file", file)
    file.write_text("review,text\ngood soup,an atom\n")
    assert [row["text"] for row in said(run, "--file", file)] == ["good soup"]
    assert [row["text"] for row in said(run, "--file", file, "--text-column", "text")] == ["an atom"]
    file.write_text("text,label\ngood soup,food\n")
    message = refused(predict, run, "--file", file)
    assert message.endswith("line 1: no column 'review'; valid: label, text (set --text-column)")


@pytest.mark.parametrize("name", ["new.csv.gz", "new.tsv", "new.jsonl", "new.json", "new.dat"])
def test_predict_reads_every_format(make_run: Run, said: Said, tmp_path: Path, name: str) -> None:
    run, file = make_run(format="csv" if name == "new.dat" else None), tmp_path / name
    content = {
        "new.csv.gz": "text,label\ngood soup,food\n", "new.dat": "text,label\ngood soup,food\n",
        "new.tsv": "text\tlabel\ngood soup\tfood\n", "new.jsonl": '{"text": "good soup"}\n',
        "new.json": '[{"text": "good soup"}]',
    }[name]  # fmt: skip
    file.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    assert [row["text"] for row in said(run, "--file", file)] == ["good soup"]


def test_output_lines_up_with_input(
    make_run: Run, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, content = make_run(), b"\nsoup\r\n \nan\xe2\x80\xa8atom\n\xe2\x80\x8b\nbread\n"
    (tmp_path / "lines").write_bytes(content)
    rows = said(run, "--file", tmp_path / "lines")
    assert [row["text"] for row in rows] == ["", "soup", "", "an\u2028atom", "", "bread"]
    assert [row["label"] is None for row in rows] == [True, False, True, False, True, False]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert said(run) == rows
    predict.main([str(run), "--file", str(tmp_path / "lines")])
    assert len(capsys.readouterr().out.rstrip("\n").split("\n")) >= 6
    (tmp_path / "blank.txt").write_text("\n \n")
    assert refused(predict, run, "--file", tmp_path / "blank.txt") == "kd-predict: no sentences: every line is empty"


@pytest.mark.parametrize("arguments", [["--json", "{}"], ["{}", "--json"], ["--json", "--seed", "0", "--", "{}"]])
def test_options_may_stand_before_the_sentences(
    make_run: Run, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    text = "-good soup" if "--" in arguments else "good soup"
    predict.main([str(make_run()), *(argument.format(text) for argument in arguments)])
    assert json.loads(capsys.readouterr().out)["text"] == text


def test_bytes_that_are_no_text_end_in_one_line(
    make_run: Run, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, content = make_run(), "fine\nun thé\n".encode("latin-1")
    (tmp_path / "new.txt").write_bytes(content)
    says = "line 2: byte 0xe9 at offset 10 is not utf-8; set --encoding to "
    assert says in refused(predict, run, "--file", tmp_path / "new.txt")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert f"kd-predict: standard input: {says}its own" == refused(predict, run)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert [row["text"] for row in said(run, "--encoding", "latin-1")] == ["fine", "un thé"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert "--encoding='utf9' is not an encoding Python knows" in refused(predict, run, "--encoding", "utf9")
    assert "text 2 of the command line: '\\udce9' is half a character" in refused(predict, run, "a", "th\udce9")
    (tmp_path / "new.jsonl").write_text('{"text": "cut \\ud83d"}\n')
    assert "new.jsonl: line 1, column 'text': '\\ud83d' is half a" in refused(
        predict, run, "--file", tmp_path / "new.jsonl"
    )
    assert "nowhere.txt: cannot be read: " in refused(predict, run, "--file", tmp_path / "nowhere.txt")


def test_pairs_are_read_from_both_columns(make_run: Run, said: Said, tmp_path: Path) -> None:
    run = make_run(texts=2, text_column="a", text_pair_column="b")
    (tmp_path / "new.csv").write_text("a,b,label\ngood,soup,food\n,,food\n")
    assert [row["text"] for row in said(run, "--file", tmp_path / "new.csv")] == ["good\tsoup", ""]
    assert "two texts with a tab between: 'good' is none" in refused(predict, run, "good")
    single = make_run()
    message = refused(predict, single, "--file", tmp_path / "new.csv", "--text-column", "a", "--text-pair-column", "b")
    assert "reads single texts: give no --text-pair-column" in message


def scores(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, float]:
    evaluate.main([*map(str, arguments), "--json"])
    found: dict[str, float] = json.loads(capsys.readouterr().out)
    return found


def test_eval_reads_a_file_as_the_runs_own(
    make_run: Run, said: Said, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(text_column="review", label_column="kind", encoding="gb18030", quotes=False, format="tsv")
    [row] = said(run, 'a "thé')
    file = tmp_path / "new.csv"
    file.write_bytes(f'review\tkind\na "thé\t{row["label"]}\n'.encode("gb18030"))
    assert scores(capsys, run, "--file", file)["accuracy"] == 1.0
    file.write_text(f'text,label\n"a ""thé",{row["label"]}\n', encoding="utf-8")
    given = ["--text-column", "text", "--label-column", "label", "--encoding", "utf-8", "--format", "csv"]
    assert scores(capsys, run, "--file", file, *given, "--quotes", "true")["accuracy"] == 1.0
    message = refused(evaluate, run, "--file", file, *given[2:])
    assert message.endswith("no column 'review'; valid: label, text (set --text-column)")
    message = refused(evaluate, run, "--file", file, *given[:2], *given[4:])
    assert message.endswith("no column 'kind'; valid: label, text (set --label-column)")
    file.write_bytes(b"text,label\n\xff,food\n")
    assert "is not utf-8; set --encoding to the file's own" in refused(evaluate, run, "--file", file, *given)
    file.write_text('text,label\n"a,food\n')
    message = refused(evaluate, run, "--file", file, *given, "--quotes=true")
    assert "or set --quotes=false" in message


def test_eval_takes_numbers_for_words_only_from_a_run_that_numbered_them(
    make_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new.csv").write_text("text,label\nsoup,0\n")
    message = refused(evaluate, make_run(), "--file", tmp_path / "new.csv")
    assert "unknown label '0': the classes are food, science" in message
    run = make_run(class_names=["food", "science"])
    assert scores(capsys, run, "--file", tmp_path / "new.csv")["examples"] == 1


def test_a_text_in_place_of_the_folder_is_refused_before_standard_input_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", None)
    expected = "kd-predict: a lovely film: no such folder; the first argument is the run or export that predicts"
    assert refused(predict, "a lovely film") == expected


def test_eval_says_where_a_file_is_one_that_the_run_learned_from(
    make_run: Run, toy_csv: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(train_file=str(toy_csv))
    evaluate.main([str(run), "--file", str(toy_csv)])
    assert "the run learned from texts of this file: without --file its test split alone is scored" in caplog.text
    caplog.clear()
    (tmp_path / "other.csv").write_text(toy_csv.read_text())
    evaluate.main([str(run), "--file", str(tmp_path / "other.csv")])
    assert not caplog.text
