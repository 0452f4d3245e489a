"""What is wrong with what masked language models are given is written before any training, in one line."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from rich.console import Console
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, BertModel

from kd_lightning.data.text.tokens import load_tokenizer, write_tokenizer
from kd_lightning.pipeline.compare import compare
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.run import train_all
from kd_lightning.runtime.errors import KDError
from kd_lightning.tasks import MaskedLanguageModeling
from tests.data.corpus.texts import made, written

pytestmark = pytest.mark.usefixtures("own_home")
Composed = Callable[..., DictConfig]


class Given:
    """A folder with texts, and an encoder without a head for masked tokens."""

    def __init__(self, folder: Path, composed: Composed) -> None:
        self.folder, self.composed = folder, composed
        written(folder, made(40))
        tokenizer = load_tokenizer("wordpiece:120", made(40))
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=20, **sizes)
        BertModel(config).save_pretrained(folder / "encoder")
        write_tokenizer(tokenizer, folder / "encoder")

    def run(self, *overrides: str) -> Run:
        cfg = self.composed(
            "data=masked_text", f"data.train_file={self.folder / 'corpus.jsonl'}", "data.block_size=16",
            "data.batch_size=8", f"data.tokenizer={self.folder / 'encoder'}", "model@student=masked_lm_small",
            "student.hidden_size=8", "student.num_layers=1", f"teacher.checkpoint={self.folder / 'encoder'}",
            "stages=[distill]", "trainer.max_steps=2", "temperature=1", "teacher.precision=float32",
            "trainer.precision=32-true", f"run_dir={self.folder / 'run'}", *overrides,
        )  # fmt: skip
        run = Run(cfg, Console(file=StringIO(), width=120))
        train_all(run)
        return run

    def refused(self, *overrides: str) -> str:
        """Return the message of a run that must not begin to train."""
        with pytest.raises(KDError) as caught:
            self.run(*overrides)
        assert not list((self.folder / "run").rglob("*.safetensors")), "something was trained"
        message = str(caught.value)
        assert "\n" not in message.strip()
        return message


@pytest.fixture
def given(tmp_path: Path, composed: Composed) -> Given:
    return Given(tmp_path, composed)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.mask_probability=1.5"], r"data\.mask_probability=1\.5: expected a number from 0 to below 1"),
        (["data.packing=documents"], r"data\.packing=documents: networks that read both sides do not keep"),
        (["data.mask_sets=null"], r"data\.mask_sets=null makes new inputs in every epoch.*set data\.mask_sets=K"),
        (
            ["data.tokenizer=wordpiece:60"],
            r"^the teacher's tokenizer .* and data\.tokenizer=wordpiece:60 differ in [^:]*: "
            r"give the data the teacher's$",
        ),
        (["data.block_size=24"], "block_size=24: .*encoder has positions for 20 tokens; set it lower"),
        (["generated.texts=1"], r"generated\.texts=1: only a teacher that is a language model"),
        (["on_policy.share=0.5", "teacher.cache=off"], r"on_policy\.share=0\.5: only a language model continues texts"),
        (["teacher.cache_top_k=500"], r"teacher\.cache_top_k=500 must be below the number of classes"),
        (["model@student=bilstm"], "student: .*BiLSTM needs num_classes"),
    ],
)
def test_what_does_not_fit_is_refused(given: Given, overrides: list[str], says: str) -> None:
    assert re.search(says, given.refused(*overrides))


def test_all_logits_of_a_teacher_that_stores_some_are_refused_before_it_runs(
    given: Given, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kd_lightning.teachers.cache.outputs.MOST_DENSE", 64)  # read back sparse, as large vocabularies
    message = given.refused("distillation=soft_target", "teacher.cache_top_k=8")
    assert "it compares all logits, and the teacher gives only some" in message
    assert not list(own_home.rglob("manifest.json")), "the teacher has run"


@pytest.mark.parametrize(
    ("records", "says"),
    [
        ([{"text": "only one"}], "1 different documents are too few to hold some out"),
        ([], "data.train_file: there are no documents in it"),
        ([{"text": "fine"}, {"text": " "}], "corpus.jsonl.*2.*the text is empty; fill it in or remove it"),
    ],
)
def test_texts_that_cannot_be_used_are_refused(given: Given, records: list[dict[str, str]], says: str) -> None:
    (given.folder / "corpus.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert re.search(says, given.refused())


@pytest.mark.parametrize("distillation", ["minilmv2", pytest.param("hint_hidden", marks=pytest.mark.slow)])
def test_a_teacher_without_a_head_teaches_by_its_layers(
    given: Given, distillation: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With `alpha=0` its new head counts nothing: with another one it teaches the same."""
    torch.manual_seed(1)
    other = BertForMaskedLM.from_pretrained(given.folder / "encoder")
    other.save_pretrained(given.folder / "other")
    write_tokenizer(load_tokenizer(str(given.folder / "encoder")), given.folder / "other")
    found, heads = [], "distillation.terms.minilmv2.relation_heads=4"
    for name in ("encoder", "other"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            given.run(
                f"distillation={distillation}", "alpha=0", "teacher.cache=off", *[heads] * (distillation == "minilmv2"),
                f"run_dir={given.folder / 'run' / name}", f"teacher.checkpoint={given.folder / name}",
            )  # fmt: skip
        assert ("it gets a new one, untrained" in caplog.text) is (name == "encoder")
        found.append(load_file(given.folder / "run" / name / "seed_0/distill/model.safetensors"))
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())


def test_a_teacher_without_a_head_is_left_out_of_the_report(given: Given) -> None:
    run = given.run("distillation=hint_hidden", "alpha=0", "teacher.cache=off", "trainer.max_steps=1")
    report = compare(run, "a test")
    assert list(report["models"]) == ["distilled"]
    assert "agreement" not in str(report["models"])
    assert report["warnings"][0].startswith("The teacher's head is new and untrained: its scores, and agreement")


def test_a_new_head_of_a_finished_teacher_is_always_the_same(given: Given) -> None:
    """So that a run that goes on, or is made again, has the same teacher."""
    task = MaskedLanguageModeling(len(load_tokenizer(str(given.folder / "encoder"))))
    one, two = (task.finished(str(given.folder / "encoder"), {}) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
