"""A whole run of language models, offline and small: from a folder of text to the report."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from kd_lightning.cli.export import main
from kd_lightning.data.text.tokens import load_tokenizer, write_tokenizer
from kd_lightning.evaluation.generation import Decoding
from kd_lightning.evaluation.generation import generate as generated
from kd_lightning.export.load import load_export
from kd_lightning.models.causal_lm import CausalLM, causal_lm_small
from kd_lightning.pipeline.compare import compare
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.run import train_all
from kd_lightning.runtime.borders import markdown
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.tasks import CausalLanguageModeling
from kd_lightning.teachers.cache import outputs
from kd_lightning.training.run_folder import TrainedModel, load_run
from tests.data.corpus.texts import WORDS

Composed = Callable[..., DictConfig]


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """More are for those who read the figures."""
    monkeypatch.setattr("kd_lightning.pipeline.speeds.DRAFT_PROMPTS", 3)


@pytest.fixture
def overrides(tmp_path: Path, own_home: Path) -> list[str]:
    """Texts that go round in a circle of words from anywhere: easy to learn."""
    rng = random.Random(0)
    texts = []
    for number in range(60):
        start = rng.randrange(len(WORDS))
        texts.append(f"{number}: " + " ".join(WORDS[(start + i) % len(WORDS)] for i in range(rng.randint(10, 40))))
    path = tmp_path / "texts"
    path.mkdir()
    (path / "some.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:50]))
    for number, text in enumerate(texts[50:]):
        (path / f"{number}.txt").write_text(text)
    write_tokenizer(load_tokenizer("bpe:300", texts), tmp_path / "tokenizer")
    return [
        "data=lm_text", f"data.train_file={path}", f"data.tokenizer={tmp_path / 'tokenizer'}", "data.block_size=32",
        "data.batch_size=4", "model@teacher.network=causal_lm_small", "teacher.network.hidden_size=32",
        "teacher.network.num_layers=2", "teacher.network.num_heads=2", "model@student=causal_lm_small",
        "student.hidden_size=16", "student.num_layers=1", "student.num_heads=2", "teacher.trainer.max_epochs=6",
        "teacher.trainer.precision=32-true", "teacher.precision=float32", "teacher.batch_size=4",
        "teacher.optimizer.lr=0.01", "trainer.max_epochs=2", "optimizer.lr=0.01", "teacher.validations=2",
        "trainer.precision=32-true", "validations=2", "temperature=1", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip


def run(cfg: DictConfig) -> dict[str, Any]:
    prepared = Run(cfg, Console(file=StringIO(), width=120))
    train_all(prepared)
    return compare(prepared, "kd-train ...")


def test_from_a_folder_of_text_to_a_student_and_its_report(
    composed: Composed, overrides: list[str], tmp_path: Path
) -> None:
    report = run(composed(*overrides, "teacher.cache=off"))
    scores = {
        name: {key: value["mean"] for key, value in model["test"].items()} for name, model in report["models"].items()
    }
    assert scores["teacher"]["accuracy"] > 0.5  # a circle of words
    assert scores["teacher"]["perplexity"] < scores["distilled"]["perplexity"] < 300
    assert scores["distilled"]["kl_to_teacher"] < scores["baseline"]["kl_to_teacher"]
    assert scores["distilled"]["agreement"] > scores["baseline"]["agreement"]
    assert 0 < scores["teacher"]["bits_per_byte"] < 8
    assert scores["untrained"]["cross_entropy"] == pytest.approx(math.log(300), rel=0.1)
    assert scores["untrained"]["perplexity"] > scores["baseline"]["perplexity"]
    check_report(report, (tmp_path / "run" / "report.md").read_text())
    trained = load_run(tmp_path / "run" / "seed_0" / "distill")
    assert isinstance(trained.network, CausalLM)
    assert isinstance(trained.task, CausalLanguageModeling)
    assert trained.tokenizer is not None
    check_exported(tmp_path, trained)


def check_report(report: dict[str, Any], text: str) -> None:
    """Errors are by document, generation is timed, students draft for the teacher, and all go on with some prompts."""
    models = report["models"]
    for name in ("cross_entropy", "perplexity", "bits_per_byte", "accuracy", "agreement_top5", "kl_to_teacher/1-16"):
        assert models["distilled"]["test"][name]["standard_error"] > 0, name
        assert name == "perplexity" or report["differences"]["distilled"]["baseline"]["paired"]
    assert report["data"]["units"] == 6  # documents, fewer than blocks
    assert report["data"]["chance_score"] > models["teacher"]["test"]["cross_entropy"]["mean"]
    assert all(models[name]["generation"]["decode_per_second"] > 0 for name in ("teacher", "baseline", "distilled"))
    assert all(0 <= models[name]["draft"]["greedy"]["rate"] <= 1 for name in ("baseline", "distilled"))
    assert not models["teacher"].keys() & {"draft"}
    assert not models["untrained"].keys() & {"draft", "generation"}
    assert len(report["samples"]) == 3
    for one in report["samples"]:
        assert set(one["models"]) == {"teacher", "baseline", "distilled"}
        assert f"| prompt | {markdown(one['prompt'].strip())} |" in text
    assert "| student from text | " in text
    assert "labels alone" not in text


def check_exported(tmp_path: Path, trained: TrainedModel) -> None:
    """Transformers loads the student without our code: the same logits, and it goes on with a text as we would."""
    main([str(tmp_path / "run"), "--format", "huggingface", "--out", str(tmp_path / "folder")])
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    ids = tokenizer("some words", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(network(ids).logits, trained.network.eval()(ids).logits)
    assert network.generation_config.eos_token_id == trained.tokenizer.eos_token_id  # type: ignore[union-attr]
    generate = pipeline("text-generation", str(tmp_path / "folder"))
    [found] = generate("some words", max_new_tokens=5, do_sample=False)
    for _ in range(5):
        with torch.no_grad():
            ids = torch.cat([ids, trained.network(ids).logits[:, -1:].argmax(-1)], 1)
    assert found["generated_text"] == tokenizer.decode(ids[0], skip_special_tokens=True)
    went_on = generated(load_export(tmp_path / "folder"), "some words", Decoding(max_new_tokens=5))
    assert went_on == generated(trained, "some words", Decoding(max_new_tokens=5))
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card
    assert "AutoModelForCausalLM" in card


def test_stored_outputs_train_the_same_student_as_the_running_teacher(
    composed: Composed, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether they are read back whole, or sparse and in chunks."""
    sparse = ["distillation=sparse_kd", "distillation.terms.kd.top_k=16", "stages=[teacher,distill]"]
    live = run(composed(*overrides, *sparse, "teacher.cache=off"))
    weights = load_file(tmp_path / "run/seed_0/distill/model.safetensors")
    for most_dense, logits in ((1024, "true"), (8, "false")):
        monkeypatch.setattr(outputs, "MOST_DENSE", most_dense)
        again = Path(shutil.copytree(tmp_path / "run", tmp_path / f"again_{most_dense}"))
        shutil.rmtree(again / "seed_0")  # the same teacher teaches again
        (again / "config.yaml").unlink()
        settings = [f"run_dir={again}", "teacher.cache_top_k=16", f"student.logits_in_training={logits}"]
        stored = run(composed(*overrides, *sparse, *settings))
        for name, weight in load_file(again / "seed_0/distill/model.safetensors").items():
            torch.testing.assert_close(weight, weights[name], rtol=1e-3, atol=1e-3)
        assert live["models"]["teacher"]["test"] == stored["models"]["teacher"]["test"]  # not cut to what is stored
        one, other = (report["models"]["distilled"]["test"]["cross_entropy"]["mean"] for report in (live, stored))
        assert one == pytest.approx(other, rel=1e-3)


def test_drawn_tokens_train_the_same_student_stored_and_live(
    composed: Composed, overrides: list[str], tmp_path: Path
) -> None:
    """The report scores the whole teacher, and what drawn tokens do not give is refused before any training."""
    drawing = ["distillation=sparse_kd", "teacher.cache_samples=16", "student.logits_in_training=false"]
    with pytest.raises(ConfigError, match="divergence=jsd is no mean over the teacher's distribution"):
        run(composed(*overrides, *drawing, "stages=[teacher,distill]", "distillation.terms.kd.divergence=jsd"))
    assert not (tmp_path / "run" / "teacher").exists()
    live = run(composed(*overrides, *drawing, "stages=[teacher,distill]", "teacher.cache=off"))
    again = Path(shutil.copytree(tmp_path / "run", tmp_path / "again"))
    shutil.rmtree(again / "seed_0")  # the same teacher teaches again
    (again / "config.yaml").unlink()
    stored = run(composed(*overrides, *drawing, "stages=[teacher,distill]", f"run_dir={again}"))
    weights = load_file(tmp_path / "run/seed_0/distill/model.safetensors")
    for name, weight in load_file(again / "seed_0/distill/model.safetensors").items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-3, atol=1e-3)
    assert live["models"]["teacher"]["test"] == stored["models"]["teacher"]["test"]
    assert live["models"]["distilled"]["test"]["perplexity"]["mean"] < 300


def test_layers_of_the_teacher_are_trained_to_its_hidden_states_first(composed: Composed, overrides: list[str]) -> None:
    """And compared with the same network from labels, from random weights and from the teacher's."""
    own = [one for one in overrides if not one.startswith(("model@student", "student.", "trainer.max_epochs"))]
    student = ["model@student=causal_lm_from_teacher", "student.layers=1", "distillation=hidden_then_logits"]
    report = run(composed(*own, *student, "teacher.cache=off", "trainer.max_epochs=3"))
    scores = {name: model["test"]["perplexity"]["mean"] for name, model in report["models"].items()}
    assert set(scores) == {"teacher", "untrained", "baseline", "baseline_initialised", "distilled"}
    assert scores["distilled"] < 300  # as many as there are tokens


def test_a_checkpoint_of_hugging_face_teaches_with_its_own_tokenizer(
    composed: Composed, overrides: list[str], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    torch.manual_seed(0)
    network = causal_lm_small(len(tokenizer) + 4, 32, hidden_size=16, num_layers=1, num_heads=2).network
    network.save_pretrained(tmp_path / "llama")  # with rows that no token has
    write_tokenizer(tokenizer, tmp_path / "llama")
    without = [one for one in overrides if not one.startswith(("data.tokenizer", "model@teacher", "teacher.network"))]
    teacher = [f"teacher.checkpoint={tmp_path / 'llama'}", "stages=[distill]", "trainer.max_epochs=1", "validations=1"]
    report = run(composed(*without, *teacher))
    assert set(report["models"]) == {"teacher", "untrained", "distilled"}
    assert report["models"]["teacher"]["test"]["perplexity"]["mean"] == pytest.approx(len(tokenizer), rel=0.1)
    with pytest.raises(ConfigError, match=r"data\.block_size=64: .*llama has positions for 32 tokens"):
        run(composed(*without, *teacher, "data.block_size=64", f"run_dir={tmp_path / 'other'}"))


def test_a_trimmed_vocabulary_teaches_with_the_tokens_of_the_training_text(
    composed: Composed, overrides: list[str], tmp_path: Path
) -> None:
    words = [*WORDS, "zebra", "quartz", "jumbo"]
    tokenizer = load_tokenizer("bpe:400", [f"{one} {other}" for one in words for other in words])
    torch.manual_seed(0)
    network = causal_lm_small(len(tokenizer) + 4, 32, hidden_size=16, num_layers=2, num_heads=2).network
    network.save_pretrained(tmp_path / "llama")
    write_tokenizer(tokenizer, tmp_path / "llama")
    without = [
        one for one in overrides if not one.startswith(("data.tokenizer", "model@", "teacher.network", "student"))
    ]
    teacher = [f"teacher.checkpoint={tmp_path / 'llama'}", "stages=[distill]", "trainer.max_epochs=1", "validations=1"]
    trims = [f"data.tokenizer=trimmed:{tmp_path / 'llama'}", "model@student=causal_lm_from_teacher", "student.layers=1"]
    prepared = Run(composed(*without, *teacher, *trims), Console(file=StringIO(), width=120))
    train_all(prepared)
    report = compare(prepared, "kd-train ...")
    trained = load_run(tmp_path / "run")
    size = len(trained.tokenizer)  # type: ignore[arg-type]
    assert size < len(tokenizer)
    assert trained.network.network.get_input_embeddings().num_embeddings == size  # type: ignore[operator, union-attr]
    assert report["models"]["teacher"]["test"]["perplexity"]["mean"] == pytest.approx(size, rel=0.1)
    assert generated(trained, "the people, and a zebra", Decoding(max_new_tokens=3))["tokens"]
    main([str(tmp_path / "run"), "--format", "huggingface", "--out", str(tmp_path / "folder")])
    assert len(AutoTokenizer.from_pretrained(tmp_path / "folder")) == size


def test_from_conversations_to_a_student(composed: Composed, overrides: list[str], tmp_path: Path) -> None:
    """Only the assistant's turns are learned, and stored outputs teach as the running teacher does."""
    rng = random.Random(0)
    chats = []
    for number in range(60):
        start = rng.randrange(len(WORDS))
        content = " ".join(WORDS[(start + i) % len(WORDS)] for i in range(rng.randint(3, 8)))
        chats.append({"prompt": f"{number} {WORDS[start]}", "response": content})
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    ours = [one for one in overrides if not one.startswith(("data=", "data.train_file", "data.block_size"))]
    ours += ["data=chat", f"data.train_file={tmp_path / 'chats.jsonl'}", "data.block_size=96"]
    ours += ["data.chat_template=plain", "distillation=sparse_kd", "distillation.terms.kd.top_k=16"]
    ours += ["stages=[teacher,distill]", "teacher.calibrate=false"]
    live = run(composed(*ours, "teacher.cache=off"))
    again = Path(shutil.copytree(tmp_path / "run", tmp_path / "stored"))
    shutil.rmtree(again / "seed_0")  # the same teacher teaches again
    (again / "config.yaml").unlink()
    stored = run(composed(*ours, "teacher.cache_top_k=16", f"run_dir={again}"))
    assert live["models"]["teacher"]["test"] == stored["models"]["teacher"]["test"]
    one, other = (report["models"]["distilled"]["test"]["cross_entropy"]["mean"] for report in (live, stored))
    assert one == pytest.approx(other, rel=1e-3)
    trained = load_run(tmp_path / "stored" / "seed_0" / "distill")
    assert "generation" in str(trained.tokenizer.chat_template)  # type: ignore[union-attr]
