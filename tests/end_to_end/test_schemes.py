"""Who teaches whom: assistants, generations, the mean teacher, peers, exits, stages. Offline and small."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from omegaconf import DictConfig
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from kd_lightning.config.instantiate import conf_dir
from kd_lightning.losses import CrossEntropyLoss, SoftTargetLoss
from kd_lightning.losses.term import Term
from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.models.cohort import Cohort, joined
from kd_lightning.pipeline.compare import compare
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.run import build_caches, train_all
from kd_lightning.pipeline.validation import validate
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.runtime.fingerprints import file_digest
from kd_lightning.tasks import Classification
from kd_lightning.teachers import EMATeacher
from kd_lightning.teachers.cache.manifest import Manifest
from kd_lightning.training.callbacks import MeanTeacher
from kd_lightning.training.distillation import DistillationModule
from kd_lightning.training.objective import Objective
from kd_lightning.training.run_folder import load_run
from kd_lightning.training.schedules import Step
from kd_lightning.types import Batch, ModelOutput
from tests.conftest import tiny_overrides
from tests.runs import student_of

Composed = Callable[..., DictConfig]
ASSISTANT = "assistants=[{_target_: kd_lightning.models.bilstm.BiLSTM, embedding_size: 12, hidden_size: 12}]"
MEAN_TEACHER = ["teacher.ema=0.9", "stages=[distill]", "data.views=1", "trainer.max_epochs=4", "student.dropout=0.3"]


@pytest.fixture
def overrides(toy_csv: Path, tmp_path: Path, own_home: Path) -> list[str]:
    return tiny_overrides(toy_csv, tmp_path / "run")


def run(cfg: DictConfig) -> tuple[Run, str]:
    output = StringIO()
    pipeline = Run(cfg, Console(file=output, width=120))
    train_all(pipeline)
    return pipeline, output.getvalue()


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "stage.json").read_text())
    return found


# -- assistants and generations ---------------------------------------------------------------------------------------


def test_each_assistant_learns_from_the_one_before_and_the_students_from_the_last(
    composed: Composed, overrides: list[str], tmp_path: Path, own_home: Path
) -> None:
    chain = [ASSISTANT[:-1] + ", '${student}']", "seeds=2"]
    pipeline, said = run(composed(*overrides, *chain))
    report = compare(pipeline, "kd-train ...")
    folder = tmp_path / "run"
    links = [folder / name for name in ("teacher", "assistant_1", "assistant_2")]
    for above, below in zip(links, [*links[1:], folder / "seed_0" / "distill"], strict=True):
        assert record(below)["settings"]["teacher"] == file_digest(above / "model.safetensors")
    assert record(folder / "seed_1" / "distill")["settings"]["teacher"] == file_digest(links[2] / "model.safetensors")
    sizes = [load_run(link).network.arguments["hidden_size"] for link in links]
    assert sizes == [16, 12, 8]
    assert {record(link)["steps"] for link in links[1:]} == {pipeline.steps}

    caches = [Manifest.read(path) for path in own_home.glob("teacher_outputs/*/manifest.json")]
    assert {cache.key["teacher"]["weights"] for cache in caches} == {
        file_digest(link / "model.safetensors") for link in links
    }, "the outputs of each are kept under its own weights"
    assert list(report["models"]) == ["teacher", "assistant_1", "assistant_2", "baseline", "distilled"]
    link = report["models"]["assistant_1"]
    assert link["title"] == "assistant 1"
    assert len(link["test"]["accuracy"]["values"]) == 1
    assert link["size"]["parameters"] > report["models"]["distilled"]["size"]["parameters"]
    assert set(report["stages"]) >= {"assistant_1", "assistant_2"}
    assert "assistant 2" in (folder / "report.md").read_text()

    (folder / "seed_1" / "distill" / "stage.json").unlink()
    _, said = run(composed(*overrides, *chain))
    assert said.count("finished before") == 6  # teacher, two assistants, two baselines, one student
    with pytest.raises(ConfigError, match="assistants was"):
        Run(composed(*overrides, ASSISTANT, "seeds=2"))


def test_an_assistant_reads_the_students_tokens(composed: Composed, overrides: list[str], tmp_path: Path) -> None:
    pipeline, _ = run(composed(*overrides, ASSISTANT, "data.teacher_tokenizer=wordpiece:90"))
    sizes = {name: len(load_run(tmp_path / "run" / name).tokenizer) for name in ("teacher", "assistant_1")}  # type: ignore[arg-type]
    assert sizes["teacher"] < sizes["assistant_1"]
    assert "teacher_input_ids" in next(iter(pipeline.student_data(0, True, 0).train_dataloader()))
    assert "teacher_input_ids" not in next(iter(pipeline.student_data(0, True, 1).train_dataloader()))
    own = pipeline.data.with_one_reader()
    assert own.teacher_key["tokenizer"] != pipeline.data.teacher_key["tokenizer"]
    assert own.model_arguments("teacher") == pipeline.data.model_arguments("student")
    assert pipeline.data.has_two_tokenizers, "the original is left as it is"


def test_assistants_that_have_no_place_are_refused_before_any_training(
    composed: Composed, overrides: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="distillation reads no teacher"):
        run(composed(*overrides, ASSISTANT, "distillation=labels_only"))
    with pytest.raises(ConfigError, match=r"there is no teacher: add teacher to stages"):
        run(composed(*overrides, ASSISTANT, "stages=[distill]"))
    with pytest.raises(ConfigError, match="hidden_size=0 must be at least 1"):
        run(composed(*overrides, ASSISTANT.replace("hidden_size: 12", "hidden_size: 0")))
    assert not (tmp_path / "run").exists()


# -- the mean teacher -------------------------------------------------------------------------------------------------


class StopAt(L.Callback):
    """Breaks a training off at an optimizer step."""

    step = -1

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == StopAt.step:
            raise RuntimeError("stopped")


class Watch(L.Callback):
    """Keeps the teacher of the training."""

    teacher: Any = None
    checkpoints: dict[str, Any] = {}  # noqa: RUF012

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        Watch.teacher = pl_module.teacher
        folder = Path(trainer.default_root_dir) / "checkpoints"
        Watch.checkpoints = {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.ckpt")}


def test_a_mean_teacher_needs_no_other_and_follows_every_step(
    composed: Composed, overrides: list[str], tmp_path: Path, own_home: Path
) -> None:
    chosen = [
        *overrides, *MEAN_TEACHER, "trainer.accumulate_grad_batches=2", "checkpoint_every_n_steps=10",
        "+callbacks.watch={_target_: tests.end_to_end.test_schemes.Watch}",
    ]  # fmt: skip
    pipeline, _ = run(composed(*chosen))
    report = compare(pipeline, "kd-train ...")
    assert isinstance(Watch.teacher, EMATeacher)
    assert Watch.teacher.updates == pipeline.steps, "once an optimizer step, not once a batch"
    assert Watch.checkpoints["resume"]["mean_teacher"]["_extra_state"] == {"updates": 20}
    assert "mean_teacher" not in Watch.checkpoints["best"]
    assert not any("network" in name for name in Watch.checkpoints["resume"]["state_dict"])
    assert list(report["models"]) == ["distilled"]
    assert not (own_home / "teacher_outputs").exists()
    assert record(tmp_path / "run/seed_0/distill")["settings"]["teacher"] == {"ema": 0.9}
    with pytest.raises(ConfigError, match=r"teacher\.ema was 0\.9, now 0\.5"):
        Run(composed(*chosen, "teacher.ema=0.5"))


def test_a_stopped_training_goes_on_with_the_same_average(
    composed: Composed, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = [o for o in overrides if not o.startswith("run_dir")] + [
        *MEAN_TEACHER, "checkpoint_every_n_steps=7", "+callbacks.stop={_target_: tests.end_to_end.test_schemes.StopAt}"
    ]  # fmt: skip
    run(composed(*common, f"run_dir={tmp_path / 'whole'}"))
    monkeypatch.setattr(StopAt, "step", 17)
    with pytest.raises(RuntimeError, match="stopped"):
        run(composed(*common, f"run_dir={tmp_path / 'stopped'}"))
    monkeypatch.setattr(StopAt, "step", -1)
    shutil.copytree(tmp_path / "stopped", tmp_path / "forgets")
    run(composed(*common, f"run_dir={tmp_path / 'stopped'}"))
    monkeypatch.setattr(MeanTeacher, "on_load_checkpoint", lambda *_: None)  # as if the average were not restored
    run(composed(*common, f"run_dir={tmp_path / 'forgets'}"))
    whole, resumed, forgot = (
        load_file(tmp_path / name / "seed_0/distill/model.safetensors") for name in ("whole", "stopped", "forgets")
    )
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert not all(torch.equal(value, forgot[name]) for name, value in whole.items())


# -- peers ------------------------------------------------------------------------------------------------------------


def test_peers_learn_from_each_other_and_the_first_is_saved_alone(
    composed: Composed, overrides: list[str], tmp_path: Path
) -> None:
    other = "{_target_: kd_lightning.models.bilstm.BiLSTM, embedding_size: 4, hidden_size: 4}"
    chosen = ["distillation=deep_mutual", f"peers=['${{student}}', {other}]", "stages=[baseline,distill]"]
    pipeline, _ = run(composed(*overrides, *chosen))
    report = compare(pipeline, "kd-train ...")
    model = load_run(tmp_path / "run")
    assert isinstance(model.network, BiLSTM)
    assert model.network.arguments["hidden_size"] == 8
    assert not any("peers" in name for name in load_file(model.folder / "model.safetensors"))
    assert list(report["models"]) == ["baseline", "distilled"]
    sizes = [entry["size"]["parameters"] for entry in report["models"].values()]
    assert sizes[0] == sizes[1], "measured is one student, not the cohort"
    saved = record(tmp_path / "run/seed_0/distill")
    assert [peer.get("hidden_size") for peer in saved["settings"]["peers"]] == [8, 4]
    predicted = [entry["validation"]["accuracy"]["mean"] for entry in report["models"].values()]
    assert saved["validation"]["accuracy"] == pytest.approx(predicted[1])
    first = student_of(pipeline, "baseline")
    start = {name: value.clone() for name, value in first.state_dict().items()}
    again = student_of(pipeline)
    assert all(torch.equal(value, start[name]) for name, value in again.state_dict().items())


def test_a_cohort_predicts_as_its_first_peer_and_peers_differ() -> None:
    torch.manual_seed(0)
    networks = [BiLSTM(3, 20, hidden_size=size) for size in (8, 4)]
    cohort = joined(networks[0], networks[1:]).eval()
    assert isinstance(cohort, Cohort)
    assert joined(networks[0], []) is networks[0]
    batch = {"input_ids": torch.randint(1, 20, (5, 6)), "attention_mask": torch.ones(5, 6, dtype=torch.long)}
    with torch.no_grad():
        said = cohort.peers(batch)
        torch.testing.assert_close(cohort(**batch), networks[0](**batch).logits)
        torch.testing.assert_close(said[:, 1], networks[1](**batch).logits)
    assert said.shape == (5, 2, 3)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (["distillation=deep_mutual"], r"students that learn from each other need peers .*peers='\[\$\{student\}\]'"),
        (["peers=['${student}']"], "peers learn by their logits alone, and distillation does not read them"),
        (
            ["peers=['${student}']", "distillation=byot_hidden"],
            r"peers learn by their logits alone, and distillation reads hidden\[1\], hidden\[2\]",
        ),
    ],
)
def test_peers_without_a_loss_and_a_loss_without_peers_are_refused(
    composed: Composed, overrides: list[str], tmp_path: Path, chosen: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(composed(*overrides, "stages=[teacher,distill]", *chosen))
    assert not (tmp_path / "run").exists()


# -- exits ------------------------------------------------------------------------------------------------------------


def test_a_module_without_a_teacher_takes_only_an_objective_that_reads_none() -> None:
    network = BiLSTM(3, 20, hidden_size=4)
    labels = Objective({"ce": CrossEntropyLoss()}, {"ce": 1.0})
    assert DistillationModule(network, None, labels, torch.optim.SGD, task=Classification(3)).teacher is None
    soft = Objective({"kd": SoftTargetLoss()}, {"kd": 1.0})
    with pytest.raises(ConfigError, match="the objective reads a teacher: give one"):
        DistillationModule(network, None, soft, torch.optim.SGD, task=Classification(3))


def test_exits_are_trained_and_gone_afterwards(composed: Composed, overrides: list[str], tmp_path: Path) -> None:
    run(composed(*overrides, "distillation=byot_hidden", "stages=[distill]"))
    model = load_run(tmp_path / "run")
    assert isinstance(model.network, BiLSTM)
    assert set(load_file(model.folder / "model.safetensors")) == set(model.network.state_dict())


# -- stages of one training -------------------------------------------------------------------------------------------


class Counted(Term):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.scale = 0, nn.Parameter(torch.ones(()))

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        self.calls += 1
        return self.scale * student.logits.square().mean()


@pytest.mark.parametrize("balance", ["fixed", "unit_initial", "gradnorm", "uncertainty"])
def test_a_term_whose_weight_is_zero_now_is_not_computed_in_training(balance: str) -> None:
    first, second = Counted(), Counted()
    weights = {"first": Step([1.0, 0.0], [0.5]), "second": Step([0.0, 2.0], [0.5])}
    objective = Objective({"first": first, "second": second}, weights, balance)
    output = ModelOutput(torch.full((4, 3), 2.0, requires_grad=True))
    loss, parts = objective(output, output, {}, progress=0.2)
    assert (set(parts), first.calls, second.calls) == ({"first"}, 1, 0)
    loss, parts = objective(output, output, {}, progress=0.7)
    assert (set(parts), first.calls, second.calls) == ({"second"}, 1, 1)
    if balance == "fixed":
        assert loss.item() == pytest.approx(8.0)
    assert set(objective.account(parts, 0.7)) >= {"second", "share/second", "weight/first"}
    loss.backward()
    assert first.scale.grad is None
    objective.eval()
    _, parts = objective(output, output, {}, progress=0.7)
    assert set(parts) == {"first", "second"}, "a rehearsal tries every term"


def test_a_term_of_constant_weight_zero_is_watched() -> None:
    output = ModelOutput(torch.ones(2, 3, requires_grad=True))
    loss, parts = Objective({"a": Counted(), "b": Counted()}, {"a": 1.0, "b": 0.0})(output, output, {})
    assert set(parts) == {"a", "b"}
    assert loss.item() == 1.0


def test_where_every_weight_is_zero_the_loss_is_a_zero_with_a_graph() -> None:
    term = Counted()
    output = ModelOutput(torch.ones(2, 3, requires_grad=True))
    loss, _ = Objective({"only": term}, {"only": Step([0.0, 1.0], [0.5])})(output, output, {}, progress=0.1)
    loss.backward()
    assert loss.item() == 0.0


# -- the configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        (["assistants=[bilstm]"], "assistants[0]='bilstm' is not"),
        (["peers=[{hidden_size: 3}]"], "peers[0] has no _target_: give a network, as `student` is one, or '${stud"),
        (
            ["assistants=[{_target_: kd_lightning.models.bilstm.BiLSTM, hidden: 3}]"],
            "assistants[0].hidden: kd_lightning.models.bilstm.BiLSTM takes no 'hidden'; did you mean 'hidden_size'",
        ),
        (["assistants=['${student}']", "teacher.cache=./outputs"], "assistants: a path in teacher.cache keeps one"),
        (["+assistant=[]"], "assistant: there is no such key; did you mean 'assistants'"),
        (["teacher.device=cudaa"], "teacher.device='cudaa' is no device"),
        (["distillation=mgd_pooled", "distillation.terms.mgd.ratio=2"], "terms.mgd: "),
        (["teacher.ema=1.0"], "teacher.ema=1.0 must be at least 0 and below 1"),
        (["teacher.ema=yes"], "teacher.ema="),
        (["teacher.ema=0.9"], "leave out what needs another one (stages"),
        (
            ["teacher.ema=0.9", "stages=[distill]", "teacher.cache=require", "teacher.compile=true"],
            "(teacher.cache, teacher.compile)",
        ),
        (["teacher.ema=0.9", "stages=[distill]", "teacher.precision=bf16"], "set teacher.precision=float32"),
        (["teacher.ema=0.9", "stages=[distill]", "teacher.checkpoint=x"], "teacher.checkpoint"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_with_the_key(composed: Composed, chosen: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        validate(composed(*chosen))


TINY_TRANSFORMER = ["hidden_size=8", "num_heads=2", "intermediate_size=8"]
SHRUNK: dict[str, list[str]] = {
    "teacher_assistant": ["~teacher.network.frozen_layers", "assistants.0.hidden_size=8"],
    "born_again": ["model@teacher.network=lstm_student"],
    "mean_teacher": [],
    "deep_mutual": [],
    "byot": ["model@student=transformer", *(f"student.{size}" for size in TINY_TRANSFORMER), "student.num_layers=3"],
    "ensemble": ["~teacher.network.frozen_layers", "teacher.seeds=2"],
    "annealing_kd": ["~teacher.network.frozen_layers"],
    "tinybert": [
        "~teacher.network.frozen_layers", "model@teacher.network=transformer", "model@student=from_teacher",
        "student.layers=2", "teacher.network.num_layers=4", *(f"teacher.network.{size}" for size in TINY_TRANSFORMER),
    ],
}  # fmt: skip


RECIPES = {"reviews_bilstm", "reviews_tiny", "reviews_3layer", "reviews_bow", "fashion_resnet"}
OF_TASKS = {
    "multi_task",
    "embed_debian",
    "general_tiny",
    "masked_general",
    "writer",
    "ner_pii",
    "qa_debian",
    "rank_debian",
}
NO_SCHEMES = {"quickstart", *RECIPES, *OF_TASKS}
"""Tasks: tests/end_to_end/test_multi_task.py, test_sentence_embedding.py, test_ranking.py, test_question_answering.py,
test_masked_lm.py, test_writer.py, tests/pipeline/test_onnx_teacher.py."""


def test_no_scheme_is_left_out() -> None:
    there = {path.stem for path in (conf_dir() / "experiment").glob("*.yaml")}
    assert {name for name in there if not name.startswith("lm_")} == {*SHRUNK, *NO_SCHEMES}  # test_lm_experiments.py


@pytest.mark.parametrize("experiment", SHRUNK)
def test_every_scheme_has_an_experiment_that_runs(
    composed: Composed, overrides: list[str], tmp_path: Path, experiment: str
) -> None:
    """On toy data with tiny networks; its stages, losses and budget keys are the experiment's own."""
    assert (conf_dir() / "experiment" / f"{experiment}.yaml").is_file()
    shrunk = SHRUNK[experiment]
    for role in ("model@student", "model@teacher.network"):
        if any(o.startswith(f"{role}=") for o in shrunk):
            part = f"{role.partition('@')[2]}."
            overrides = [o for o in overrides if not o.startswith((f"{role}=", part))]
    cfg = composed(
        f"experiment={experiment}", *overrides, *shrunk, "data.transfer=[]", "trainer.max_steps=6",
        "teacher.trainer.max_steps=6",
    )  # fmt: skip
    run(cfg)
    assert record(tmp_path / "run/seed_0/baseline")["steps"] == record(tmp_path / "run/seed_0/distill")["steps"] == 6


def test_a_mean_teacher_that_nobody_asks_is_refused(composed: Composed, overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.ema makes a teacher, and distillation reads none"):
        run(composed(*overrides, "teacher.ema=0.9", "stages=[distill]", "distillation=labels_only"))


def test_generations_of_one_network_start_unlike(composed: Composed, overrides: list[str], tmp_path: Path) -> None:
    """Stopped before their first step, they are what they began with."""
    alike = [o for o in overrides if not o.startswith(("model@teacher.network", "teacher.network"))]
    chosen = ["model@teacher.network=lstm_student", "teacher.network.embedding_size=8", "teacher.network.hidden_size=8"]
    frozen = ["optimizer.lr=0.0", "teacher.optimizer.lr=0.0", "trainer.max_steps=1", "teacher.trainer.max_steps=1"]
    run(composed(*alike, *chosen, *frozen, "assistants=['${student}']", "stages=[teacher,distill]"))
    files = [tmp_path / "run" / name / "model.safetensors" for name in ("teacher", "assistant_1", "seed_0/distill")]
    first, second, third = (load_file(path)["classifier.weight"] for path in files)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    assert not torch.equal(first, third)


def test_each_process_has_an_average_of_its_own() -> None:
    student = nn.Linear(2, 2)
    teacher = EMATeacher(student)
    teacher.network.share_memory()  # as ddp_spawn hands it over
    module = DistillationModule(
        student, teacher, Objective({"kd": SoftTargetLoss()}, {"kd": 1.0}), torch.optim.SGD, task=Classification(2)
    )
    MeanTeacher().on_train_start(type("Trainer", (), {"global_step": 0})(), module)  # type: ignore[arg-type]
    assert not any(parameter.is_shared() for parameter in teacher.network.parameters())
    assert torch.equal(teacher.network.weight, student.weight)  # type: ignore[arg-type]


def test_assistants_predict_themselves_where_the_teachers_outputs_are_required(
    composed: Composed, overrides: list[str], tmp_path: Path
) -> None:
    run(composed(*overrides, "stages=[teacher]"))
    own = [o for o in overrides if not o.startswith("run_dir")]
    taught = [*own, f"teacher.checkpoint={tmp_path / 'run'}", "stages=[distill]", "assistants=['${student}']"]
    build_caches(Run(composed(*taught, f"run_dir={tmp_path / 'x'}"), Console(file=StringIO())))
    run(composed(*taught, "teacher.cache=require", f"run_dir={tmp_path / 'second'}"))
    assert (tmp_path / "second" / "assistant_1" / "stage.json").is_file()
