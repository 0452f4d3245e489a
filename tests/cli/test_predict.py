"""`kd predict` of a language model: text as it comes, or JSON, from arguments, a file or standard input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_lightning.cli.predict import main, print_piece
from kd_lightning.data.text.tokens import load_tokenizer
from kd_lightning.evaluation.generation import Decoding, generate
from kd_lightning.models.causal_lm import causal_lm_small
from kd_lightning.tasks import CausalLanguageModeling, Classification, Task
from kd_lightning.training.run_folder import finish_stage, load_run, save_network
from tests.data.corpus.texts import made


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained language model, and a network of another task."""
    folder = tmp_path_factory.mktemp("stages")
    tokenizer = load_tokenizer("bpe:300", made(30))
    torch.manual_seed(0)
    network = causal_lm_small(len(tokenizer), 64, hidden_size=16, num_layers=1, num_heads=2)
    tasks: dict[str, Task] = {"lm": CausalLanguageModeling(len(tokenizer)), "classes": Classification(2)}
    for name, task in tasks.items():
        (folder / name / "csv").mkdir(parents=True)
        names = ["a", "b"] if name == "classes" else []
        read = {"class_names": names, "predicts": task.description, "max_length": 64, "texts": 1, "role": "student"}
        save_network(folder / name, network, {}, read, tokenizer)
        finish_stage(folder / name, {})
    return folder


@pytest.fixture
def said(stages: Path) -> dict[str, Any]:
    return generate(load_run(stages / "lm"), "the people", Decoding(12))


def test_the_prompt_goes_on(stages: Path, said: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    main([str(stages / "lm"), "the people", "the people", "--max-new-tokens", "12"])
    print_piece(f"the people{said['text']}\n\nthe people{said['text']}\n")
    printed = capsys.readouterr().out
    assert printed[: len(printed) // 2] == printed[len(printed) // 2 :]


def test_json_is_an_object_a_prompt_from_a_file_too(
    stages: Path, said: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = {"prompt": "the people", **said}
    main([str(stages / "lm"), "the people", "--json", "--max-new-tokens", "12"])
    assert json.loads(capsys.readouterr().out) == line
    (tmp_path / "prompts.jsonl").write_text('{"text": "the people"}\n{"text": ""}\n')
    (tmp_path / "prompts.txt").write_text("the people\n\n")
    for file in ("prompts.jsonl", "prompts.txt"):
        main([str(stages / "lm"), "--file", str(tmp_path / file), "--json", "--max-new-tokens", "12"])
        found = [json.loads(one) for one in capsys.readouterr().out.splitlines()]
        assert found == [line, {"prompt": "", "text": None, "tokens": None, "finish_reason": None}]


def test_drawn_text_is_the_same_again(stages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def drawn(seed: str) -> str:
        main([str(stages / "lm"), "the people", "--top-p", "0.9", "--sampling-seed", seed, "--max-new-tokens", "12"])
        return capsys.readouterr().out

    assert drawn("1") == drawn("1") != drawn("2")


def test_hostile_text_reaches_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_piece("a\x1b[31mb\u202e\n\tc[red]")
    assert capsys.readouterr().out == "a\\x1b[31mb\\u202e\n\tc[red]"


@pytest.mark.parametrize(
    ("stage", "options", "says"),
    [
        ("lm", ["--chat"], "kd-predict: --chat: the tokenizer of .* has no chat template"),
        ("lm", ["--temperature", "-2"], "kd-predict: --temperature -2: give a number of at least 0"),
        ("classes", ["--top-p", "0.5"], "kd-predict: --top-p: the model in .* generates no text: leave it out"),
    ],
)
def test_mistakes_are_one_line(
    stages: Path, stage: str, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=says):
        main([str(stages / stage), "the people", *options])
    assert capsys.readouterr().out == ""
